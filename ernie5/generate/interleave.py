"""Prompts of any parts to text, pictures, clips and sound: the front door of generation, used by every caller.

A `Generation` holds a model with its tokenizers and settings; its four verbs take many prompts at once and split them
into sessions of `batch_rows` prompts each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ernie5.data.config import DataConfig
from ernie5.data.document import Document
from ernie5.data.draws import torch_seed
from ernie5.data.examples import ExampleMaker, PromptPart, shapes_of
from ernie5.data.patches import SIDE
from ernie5.errors import CheckpointError, TokenizerError
from ernie5.generate.audio import CodeChoice, generate_speech
from ernie5.generate.config import GenerateConfig
from ernie5.generate.image import BitChoice, Canvas, generate_images
from ernie5.generate.sampling import Sampling
from ernie5.generate.session import Decoder
from ernie5.generate.text import TextLimits, generate_text, search_text
from ernie5.generate.video import generate_videos
from ernie5.generate.widths import misfits
from ernie5.model.backbone import UnifiedModel
from ernie5.tokenizers.bundle import TokenizerBundle

Prompt = tuple[PromptPart, ...]


@dataclasses.dataclass(frozen=True)
class Spoken:
    """One spoken prompt. codes [n, Q] int64, waveform [n * samples per frame] fp32; empty when the model ended at
    once."""

    codes: torch.Tensor
    waveform: torch.Tensor


class Generation:
    """A model that answers prompts. The model is used as it is: callers put it into eval mode."""

    def __init__(
        self,
        model: UnifiedModel,
        *,
        tokenizers: TokenizerBundle,
        data: DataConfig,
        config: GenerateConfig,
        batch_rows: int = 32,
    ) -> None:
        self.tokenizers = tokenizers
        self.config = config
        self.maker = ExampleMaker(data, tokenizers=tokenizers, seed=config.seed, training=False)
        self.decoder = Decoder(
            model=model,
            vocab=tokenizers.vocab,
            shapes=shapes_of(tokenizers),
            visual_origin=data.positions.visual_origin,
            window_frames=data.video_attention.window_frames,
        )
        self._data = data
        self._batch_rows = batch_rows

    def with_config(self, config: GenerateConfig) -> Generation:
        """The same model and tokenizers with other settings."""
        return Generation(
            self.decoder.model, tokenizers=self.tokenizers, data=self._data, config=config, batch_rows=self._batch_rows
        )

    def require(self, modality: str) -> None:
        """Raise CheckpointError where the model lacks `modality`, TokenizerError where the tokenizer does not fit."""
        known = self.decoder.model.config.modalities
        if modality not in known:
            raise CheckpointError(
                f"This model has no {modality}: model.modalities = {', '.join(known)}. "
                f"Use a checkpoint that was trained with {modality}, or another --to."
            )
        for found in misfits(self.decoder.model.config, tokenizers=self.tokenizers, modality=modality):
            raise TokenizerError(
                f"model.{found.key} = {found.value}, and the tokenizer at hand needs {found.needed}: it is not the one "
                f"that this model was trained with for {modality}, which an export does not keep. Use the checkpoint "
                "that it was made of."
            )

    def can_read(self, medium: str) -> bool:
        """Whether the cells of pictures or clips of the size in data can be merged: a model that only draws them may
        have an odd number."""
        pixels = {"image": self._data.image_pixels, "video": self._data.video_pixels}.get(medium, 0)
        return pixels % (SIDE * self.tokenizers.visual.stride) == 0

    def write(self, prompts: Sequence[Prompt]) -> list[str]:
        """Continue or answer every prompt in text."""
        for prompt in prompts:
            self._require_parts(prompt)
        vocab, config = self.tokenizers.vocab, self.config
        limits = TextLimits(config.max_text_tokens, (vocab.eos,), vocab.text_size)
        documents = [self.maker.build_prompt(prompt, target="text") for prompt in prompts]
        if config.beam > 1:
            ids = [search_text(d, decoder=self.decoder, limits=limits, beam=config.beam) for d in documents]
        else:
            sampling = Sampling(config.temperature, config.top_k, config.top_p, config.repetition_penalty)
            ids = [
                row
                for part in self._parts(len(documents))
                for row in generate_text(
                    documents[part], decoder=self.decoder, limits=limits, sampling=sampling,
                    seed=torch_seed(config.seed) + part.start,
                )
            ]
        return [self.tokenizers.text.decode(row, exact=False) for row in ids]

    def draw(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Draw every prompt: pictures [B, 3, H, W] fp32 in [-1, 1], H = W = data.image_pixels."""
        self.require("image")
        canvas = self._canvas(self._data.image_pixels, num_frames=1, is_video=False)
        return self._visual(prompts, canvas=canvas)[:, :, 0]

    def film(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """Film every prompt: clips [B, 3, F, H, W] fp32 in [-1, 1], F = generate.video_frames."""
        self.require("video")
        num_frames = 1 + (self.config.video_frames - 1) // self.tokenizers.visual.temporal_stride
        return self._visual(prompts, canvas=self._canvas(self._data.video_pixels, num_frames=num_frames, is_video=True))

    def speak(self, prompts: Sequence[Prompt], *, speakers: Sequence[torch.Tensor | None]) -> list[Spoken]:
        """Speak every prompt in the voice of its speaker features [160]."""
        self.require("audio")
        config, spoken = self.config, []
        for part in self._parts(len(prompts)):
            documents, plain = self._conditioned(prompts[part], target="audio", speakers=speakers[part])
            choice = CodeChoice(
                Sampling(config.audio_temperature, config.top_k, config.top_p), config.max_audio_frames,
                guidance=config.audio_guidance, seed=torch_seed(config.seed) + part.start,
            )
            spoken += generate_speech(documents, unconditional=plain, decoder=self.decoder, choice=choice)
        spoken = [_beside(self.tokenizers.audio, values=codes) for codes in spoken]
        return [Spoken(codes, self._sound(codes)) for codes in spoken]

    def _visual(self, prompts: Sequence[Prompt], *, canvas: Canvas) -> torch.Tensor:
        config, target = self.config, "video" if canvas.is_video else "image"
        results = []
        for part in self._parts(len(prompts)):
            documents, plain = self._conditioned(prompts[part], target=target, speakers=[None] * len(prompts[part]))
            choice = BitChoice(config.bit_temperature, config.guidance, torch_seed(config.seed) + part.start)
            if canvas.is_video:
                latents = generate_videos(documents, unconditional=plain, decoder=self.decoder, canvas=canvas,
                                          choice=choice)
            else:
                latents = generate_images(documents, unconditional=plain, decoder=self.decoder, canvas=canvas,
                                          choice=choice)[:, :, None]
            with torch.no_grad():
                results.append(self.tokenizers.visual.decode(_beside(self.tokenizers.visual, values=latents.float())))
        return torch.cat(results)

    def _conditioned(
        self, prompts: Sequence[Prompt], *, target: str, speakers: Sequence[torch.Tensor | None]
    ) -> tuple[list[Document], list[Document]]:
        """Prompts, and the same without their condition (empty when guidance is off)."""
        pairs = list(zip(prompts, speakers, strict=True))
        for prompt in prompts:
            self._require_parts(prompt)
        build = self.maker.build_prompt
        documents = [build(prompt, target=target, speaker=speaker) for prompt, speaker in pairs]
        if (self.config.audio_guidance if target == "audio" else self.config.guidance) == 1.0:
            return documents, []
        return documents, [build((), target=target, speaker=speaker, drop_condition=True) for _, speaker in pairs]

    def _require_parts(self, prompt: Prompt) -> None:
        for part in prompt:
            for modality, value in (("image", part.image), ("video", part.video), ("audio", part.audio)):
                if value is not None:
                    self.require(modality)

    def _canvas(self, pixels: int, *, num_frames: int, is_video: bool) -> Canvas:
        visual = self.tokenizers.visual
        side = pixels // visual.stride
        return Canvas((side, side), num_frames, len(visual.sizes), visual.sizes, is_video)

    def _parts(self, count: int) -> list[slice]:
        return [slice(start, min(start + self._batch_rows, count)) for start in range(0, count, self._batch_rows)]

    def _sound(self, codes: torch.Tensor) -> torch.Tensor:
        if not len(codes):
            return torch.zeros(0)
        with torch.no_grad():
            return self.tokenizers.audio.decode(codes[None])[0]


def _beside(module: torch.nn.Module, *, values: torch.Tensor) -> torch.Tensor:
    """`values` on the device of `module`: tokenizers stay on the CPU, where data are made, also of a model on a GPU."""
    return values.to(next(module.parameters()).device)
