"""Samples and prompts to documents: the order of segments of every task (SPEC section 2).

    text            BOS text EOS
    X_to_text       BOS BOx X..X EOx SEP text EOS          X an image, a clip or speech
    text_to_image   BOS text SEP BOI [scale 2] .. [scale S] [finished picture] EOI EOS
    text_to_video   the same with BOV, frame after frame, EOV
    text_to_audio   BOS text SEP SPK BOA A1 .. An EOA EOS
    page            BOS text BOI I..I EOI text .. EOS, over as many documents as rows are needed

Training draws (caption, BPE-dropout, condition drop, bit flips) are keyed by (seed, epoch, sample); a validation
document has none of them.
"""

from __future__ import annotations

import copy
import dataclasses

import torch

from ernie5.data.config import DataConfig
from ernie5.data.corrupt import encode_scales
from ernie5.data.decode import decode_audio, decode_image, decode_video
from ernie5.data.document import Document, DocumentBuilder, Shapes
from ernie5.data.drawing import draw_codes
from ernie5.data.draws import draws_of, key_of, torch_draws_of
from ernie5.data.features import (
    DrawnPicture,
    FeatureCache,
    MediaEncoder,
    SeenPicture,
    Speech,
    open_store,
    patches_of,
)
from ernie5.data.samples import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Caption,
    Media,
    Sample,
    fitting_captions,
)
from ernie5.errors import DataError
from ernie5.tokenizers.bundle import TokenizerBundle
from ernie5.tokenizers.visual.scales import scale_schedule

POOLS = {
    "text": "text",
    "image_to_text": "image",
    "text_to_image": "image",
    "video_to_text": "video",
    "text_to_video": "video",
    "audio_to_text": "audio",
    "text_to_audio": "audio",
    "page": "page",
}
"""Task of the mixture -> task of the samples that serve it."""


@dataclasses.dataclass(frozen=True)
class PromptPart:
    """One part of a prompt, exactly one field set: text, image [3, H, W], video [3, F, H, W], audio [samples], as
    data/decode.py returns them."""

    text: str | None = None
    image: torch.Tensor | None = None
    video: torch.Tensor | None = None
    audio: torch.Tensor | None = None


def shapes_of(tokenizers: TokenizerBundle) -> Shapes:
    """Widths of the media records that these tokenizers produce."""
    return Shapes(
        bits=tokenizers.visual.bits,
        feature_channels=tokenizers.visual.feature_channels,
        patch_pixels=tokenizers.visual.stride,
        audio_levels=tokenizers.audio_levels,
        audio_codes=tokenizers.vocab.audio_codes,
        num_scales=len(tokenizers.visual.sizes),
    )


class ExampleMaker:
    """Builds documents. `training` switches every random draw on; it is off for validation and prompts."""

    def __init__(self, config: DataConfig, *, tokenizers: TokenizerBundle, seed: int, training: bool) -> None:
        self._config = config
        self._tokenizers = tokenizers
        self._vocab = tokenizers.vocab
        self._shapes = shapes_of(tokenizers)
        self._seed = seed
        self._training = training
        self._encoder = MediaEncoder(tokenizers)
        self.cache = FeatureCache(config.cache_megabytes << 20, store=open_store(config, tokenizers=tokenizers))

    def with_draws(self) -> ExampleMaker:
        """The same maker with training's random draws on; features are shared."""
        other = copy.copy(self)
        other._training = True
        return other

    def build_documents(self, sample: Sample, *, task: str, epoch: int = 0) -> tuple[Document, ...]:
        """The documents of `sample` for a task of POOLS: one, but for a page as many as it takes for each to fit a row.
        Raises DataError like `build_document`."""
        if task == "page":
            return self._page(_Draft(sample, task=task, epoch=epoch))
        return (self.build_document(sample, task=task, epoch=epoch),)

    def build_document(self, sample: Sample, *, task: str, epoch: int = 0) -> Document:
        """The document of `sample` for a task of POOLS other than page. Raises DataError that names the sample when it
        lacks a part, cannot be decoded, or (media) is longer than a row; texts may be of any length."""
        draft = _Draft(sample, task=task, epoch=epoch)
        builder = self._builder(sample.key, task=task)
        builder.text([self._vocab.bos])
        source, _, target = task.partition("_to_")
        if task == "text":
            builder.text(self._encode(sample.meta.text or "", draft=draft))
        elif target == "text":
            self._understand(builder, draft, medium=source)
            builder.text([self._vocab.sep, *self._encode(self._words(draft), draft=draft)])
        else:
            words = [] if self._drops(draft) else self._encode(self._words(draft), draft=draft)
            builder.text([*words, self._vocab.sep])
            self._generate(builder, draft, medium=target)
        builder.text([self._vocab.eos])
        document = builder.build(is_text=task == "text")
        if task != "text" and document.length > self._config.sequence_tokens:
            raise DataError(
                f"sample {sample.key} takes {document.length} positions as {task}, but a row has "
                f"data.sequence_tokens = {self._config.sequence_tokens}. Media are never split: lengthen the rows or "
                "leave the sample out."
            )
        return document

    def build_prompt(
        self,
        parts: tuple[PromptPart, ...],
        *,
        target: str,
        speaker: torch.Tensor | None = None,
        drop_condition: bool = False,
    ) -> Document:
        """The beginning of a document whose continuation is `target`: text, image, video or audio.

        Media come as understanding blocks, in order. Ends with SEP (text after media), plain text (text alone), BOI,
        BOV, or SPK BOA; the last position predicts the first group. speaker: [160], zeros when None. drop_condition
        leaves all parts out: the unconditional side of classifier-free guidance.
        """
        builder = self._builder("prompt", task=f"prompt_to_{target}")
        builder.text([self._vocab.bos])
        parts = () if drop_condition else parts
        for part in parts:
            if part.text is not None:
                builder.text(self._tokenizers.text.encode(part.text))
            else:
                self._attach(builder, part)
        if target == "text":
            if any(part.text is None for part in parts) or drop_condition:
                builder.text([self._vocab.sep])
            return builder.build()
        builder.text([self._vocab.sep])
        if target == "audio":
            builder.speaker(torch.zeros(160) if speaker is None else speaker)
            builder.begin_audio()
        else:
            builder.begin_picture(is_video=target == "video")
        return builder.build()

    def hear(self, waveform: torch.Tensor) -> Speech:
        """Codes and speaker embedding of waveform [samples], e.g. of a voice to be imitated."""
        return self._encoder.hear(waveform)

    def features_of(self, sample: Sample, *, medium: str, purpose: str) -> SeenPicture | DrawnPicture | Speech:
        """Frozen features of a sample's own image, video or audio; purpose: see, draw or hear. Cached."""
        suffixes = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}[medium]
        found = next((media for media in sample.media if media.name in suffixes), None)
        if found is None:
            raise DataError(f"sample {sample.key} has no {medium} ({', '.join(suffixes)}). Build the shard again.")
        return self._features(sample.key, media=found, medium=medium, purpose=purpose)

    def _builder(self, key: str, *, task: str) -> DocumentBuilder:
        origin = self._config.positions.visual_origin
        return DocumentBuilder(key, task=task, vocab=self._vocab, shapes=self._shapes, visual_origin=origin)

    def _features(self, key: str, *, media: Media, medium: str, purpose: str) -> SeenPicture | DrawnPicture | Speech:
        config, name = self._config, f"{key}.{media.name}"
        if medium == "image" and purpose == "draw":  # one encoder pass serves both directions of a picture
            seen = self._features(key, media=media, medium=medium, purpose="see")
            return self.cache.get(name, purpose=purpose, compute=lambda: self._encoder.project(seen))

        def compute() -> SeenPicture | DrawnPicture | Speech:
            if medium == "audio":
                return self._encoder.hear(decode_audio(media.data, name=key))
            if medium == "image":
                video = decode_image(media.data, pixels=config.image_pixels, name=key)[:, None]
            else:
                video = decode_video(media.data, pixels=config.video_pixels, frames=config.video_frames, name=key)
            is_video = medium == "video"
            return self._encoder.see(video, is_video=is_video) if purpose == "see" else self._encoder.draw(video)

        return self.cache.get(name, purpose=purpose, compute=compute, content=media.data)

    def _encode(self, text: str, *, draft: _Draft, part: int = 0) -> list[int]:
        dropout = self._config.bpe_dropout if self._training else 0.0
        seed = key_of("bpe dropout", self._seed, draft.epoch, draft.sample.key, draft.task, part)
        return self._tokenizers.text.encode(text, dropout=dropout, seed=seed)

    def _drops(self, draft: _Draft) -> bool:
        draws = draws_of("condition drop", self._seed, draft.epoch, draft.sample.key, draft.task)
        return self._training and draws.random() < self._config.condition_drop

    def _words(self, draft: _Draft) -> str:
        meta = draft.sample.meta
        if meta.task == "audio":
            words = meta.transcript
        elif meta.captions:
            words = self._caption(draft).text
        else:
            words = ", ".join(meta.keywords)
        if not words:
            raise DataError(f"sample {draft.sample.key} has no words: no transcript, captions or keywords.")
        return words

    def _caption(self, draft: _Draft) -> Caption:
        """The first language's caption, or in training with chance 1 - first_language_share one of the others."""
        captions, languages = draft.sample.meta.captions, self._config.caption_languages
        fitting = fitting_captions(captions, languages=languages)
        first = languages[0] if languages else fitting[0].language
        preferred = [caption for caption in fitting if caption.language == first]
        others = [caption for caption in fitting if caption.language != first]
        if not self._training:
            return (preferred or others)[0]
        draws = draws_of("caption", self._seed, draft.epoch, draft.sample.key, draft.task)
        share = self._config.first_language_share
        take_first = preferred and (not others or draws.random() < share)
        return draws.choice(preferred if take_first else others)

    def _understand(self, builder: DocumentBuilder, draft: _Draft, *, medium: str) -> None:
        if medium == "audio":
            speech = self.features_of(draft.sample, medium="audio", purpose="hear")
            builder.audio(speech.codes, generate=False)
        else:
            self._show(builder, self.features_of(draft.sample, medium=medium, purpose="see"), medium=medium)

    def _generate(self, builder: DocumentBuilder, draft: _Draft, *, medium: str) -> None:
        if medium == "audio":
            speech = self.features_of(draft.sample, medium="audio", purpose="hear")
            builder.speaker(speech.speaker)
            builder.audio(speech.codes, generate=True)
            return
        latents = self.features_of(draft.sample, medium=medium, purpose="draw").latents
        schedule = scale_schedule(latents.shape[-2], latents.shape[-1], sizes=self._tokenizers.visual.sizes)
        generator = torch_draws_of("corruption", self._seed, draft.epoch, draft.sample.key)
        corruption = self._config.corruption if self._training else None
        codes = encode_scales(latents, schedule=schedule, config=corruption, generator=generator)
        drawing = draw_codes(codes, schedule=schedule, num_scales=self._shapes.num_scales)
        is_video = medium == "video"
        hide_after = self._hidden_frames(latents.shape[1], draft) if is_video else {}
        builder.draw(drawing, is_video=is_video, hide_after=hide_after)
        builder.finish_picture(is_video=is_video)

    def _hidden_frames(self, num_frames: int, draft: _Draft) -> dict[int, int]:
        """Past frame -> first later frame that does not see it: beyond the window, or masked at random."""
        config = self._config.video_attention
        hidden: dict[int, int] = {}
        draws = draws_of("frame mask", self._seed, draft.epoch, draft.sample.key)
        for frame in range(num_frames - 1):
            if config.window_frames and frame + config.window_frames < num_frames:
                hidden[frame] = frame + config.window_frames
            if self._training and draws.random() < config.mask_probability:
                hidden[frame] = frame + 1
        return hidden

    def _page(self, draft: _Draft) -> tuple[Document, ...]:
        """Segments in order; where a row (less one place for EOS) is full, the page goes on in a further document,
        without a second BOS, whose first token the last position before it still predicts. Pictures stay whole."""
        key, limit = draft.sample.key, self._config.sequence_tokens - 1
        builder, parts = self._builder(key, task=draft.task), []
        builder.text([self._vocab.bos])
        for number, segment in enumerate(draft.sample.meta.segments):
            ids, seen = [self._vocab.boi], None
            if segment.text is not None:
                ids = self._encode(segment.text, draft=draft, part=number)
            else:
                media = draft.sample.find_media(segment.image or "")
                seen = self._features(key, media=media, medium="image", purpose="see")
            needed = 1 if seen is None else seen.features[0, 0].numel() // self._shapes.image_merge + 2
            if needed > limit:
                raise DataError(
                    f"a picture of sample {key} takes {needed} positions, but a row has data.sequence_tokens = "
                    f"{limit + 1}. Media are never split: lengthen the rows or leave the sample out."
                )
            while ids:
                if builder.length + needed > limit:
                    builder.expect(ids[0])
                    parts.append(builder.build())
                    builder = self._builder(key, task=draft.task)
                if seen is not None:
                    self._show(builder, seen, medium="image")
                    break
                room = limit - builder.length
                builder.text(ids[:room])
                ids = ids[room:]
        builder.text([self._vocab.eos])
        return (*parts, builder.build())

    def _show(self, builder: DocumentBuilder, seen: SeenPicture, *, medium: str) -> None:
        is_video = medium == "video"
        builder.text([self._vocab.bov if is_video else self._vocab.boi])
        builder.patches(patches_of(seen), is_video=is_video)
        builder.text([self._vocab.eov if is_video else self._vocab.eoi])

    def _attach(self, builder: DocumentBuilder, part: PromptPart) -> None:
        if part.audio is not None:
            builder.audio(self._encoder.hear(part.audio).codes, generate=False)
        elif part.image is not None:
            self._show(builder, self._encoder.see(part.image[:, None], is_video=False), medium="image")
        elif part.video is not None:
            self._show(builder, self._encoder.see(part.video, is_video=True), medium="video")
        else:
            raise DataError("a part of the prompt is empty: give text, an image, a video or audio.")


@dataclasses.dataclass(frozen=True)
class _Draft:
    """What the draws of one document are keyed by."""

    sample: Sample
    task: str
    epoch: int
