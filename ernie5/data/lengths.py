"""How many positions pictures, clips and whole samples take, known without encoding any (SPEC section 2)."""

from __future__ import annotations

import dataclasses

from ernie5.data.config import DataConfig
from ernie5.data.decode import SAMPLE_RATE
from ernie5.data.features import FRAMES_PER_GROUP
from ernie5.data.patches import SIDE
from ernie5.data.samples import SampleMeta, fitting_captions
from ernie5.tokenizers.bundle import TokenizerBundle
from ernie5.tokenizers.visual.scales import num_cells, scale_schedule
from ernie5.tokenizers.visual.tokenizer import VisualTokenizer

UNDERSTANDING_FRAME = 5  # BOS BOI .. EOI SEP text EOS, without the text
GENERATION_FRAME = 5  # BOS text SEP BOI .. EOI EOS, without the text
HEARING_FRAME = 5  # BOS BOA .. EOA SEP text EOS, without the text
SPEAKING_FRAME = 6  # BOS text SEP SPK BOA .. EOA EOS, without the text
PAGE_FRAME = 3  # BOI .. EOI, and the place that every part of a page keeps for EOS


def shortest_documents(config: DataConfig, *, visual: VisualTokenizer) -> dict[str, int]:
    """Positions of the shortest possible document, its words left out, for every task with pictures or clips."""
    image, video = config.image_pixels // visual.stride, config.video_pixels // visual.stride
    groups = -(-config.video_frames // FRAMES_PER_GROUP)
    latent_frames = 1 + (config.video_frames - 1) // visual.temporal_stride
    seen_image, seen_clip = (image // SIDE) ** 2, groups * (video // SIDE) ** 2
    return {
        "image_to_text": UNDERSTANDING_FRAME + seen_image,
        "text_to_image": GENERATION_FRAME + _frame_positions(image, visual=visual),
        "video_to_text": UNDERSTANDING_FRAME + seen_clip,
        "text_to_video": GENERATION_FRAME + latent_frames * _frame_positions(video, visual=visual),
        "page": PAGE_FRAME + seen_image,
    }


@dataclasses.dataclass(frozen=True)
class Need:
    """Positions of a sample's longest document: of its words, and of everything else; task: which document it is."""

    task: str
    words: int
    others: int

    @property
    def positions(self) -> int:
        """All of them."""
        return self.words + self.others


class SampleRuler:
    """Measures samples with media by the tasks that `config.mixture` gives a share.

    Words are counted without BPE-dropout. With it a sample at the very edge may need more than a row in some epoch,
    which is then skipped and counted.
    """

    def __init__(self, config: DataConfig, *, tokenizers: TokenizerBundle) -> None:
        self._config, self._tokenizers = config, tokenizers
        self._media = shortest_documents(config, visual=tokenizers.visual)

    def longest(self, meta: SampleMeta, *, seconds: float | None) -> Need | None:
        """The longest document of a sample; seconds: duration of its sound. None where no task uses it. Of a page the
        longest picture counts, since its text may be cut anywhere."""
        if meta.task == "page":
            lengths = {"page": self._media["page"]} if any(s.image is not None for s in meta.segments) else {}
        elif meta.task == "audio":
            frames = -(-round((seconds or 0.0) * SAMPLE_RATE) // self._tokenizers.audio.samples_per_frame)
            lengths = {"audio_to_text": HEARING_FRAME + frames, "text_to_audio": SPEAKING_FRAME + frames}
        else:
            lengths = {task: length for task, length in self._media.items() if meta.task in task.split("_to_")}
        used = {task: length for task, length in lengths.items() if vars(self._config.mixture)[task]}
        if not used:
            return None
        task = max(used, key=lambda name: used[name])
        return Need(task, words=0 if task == "page" else self._most_words(meta), others=used[task])

    def _most_words(self, meta: SampleMeta) -> int:
        captions = fitting_captions(meta.captions, languages=self._config.caption_languages)
        wordings = [meta.transcript] if meta.transcript else [caption.text for caption in captions]
        wordings = wordings or [", ".join(meta.keywords)]
        return max(len(self._tokenizers.text.encode(words)) for words in wordings)


def _frame_positions(side: int, *, visual: VisualTokenizer) -> int:
    """Positions of one drawn latent frame of side x side cells: scale 1 takes none, the finished picture one a cell."""
    return num_cells(scale_schedule(side, side, sizes=visual.sizes)) - 1 + side * side
