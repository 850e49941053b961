"""Whether a model's widths are those of its tokenizers."""

from __future__ import annotations

import dataclasses

from ernie5.data.document import SPEAKER_FEATURES
from ernie5.data.features import FRAMES_PER_GROUP
from ernie5.data.patches import SIDE
from ernie5.model.config import ModelConfig
from ernie5.tokenizers.bundle import TokenizerBundle


@dataclasses.dataclass(frozen=True)
class Misfit:
    """A setting `model.KEY` and what the tokenizers need in its place."""

    key: str
    value: int
    needed: int


def misfits(model: ModelConfig, *, tokenizers: TokenizerBundle, modality: str) -> list[Misfit]:
    """What of the model does not fit the tokenizer of `modality`, one that it has."""
    visual, audio = tokenizers.visual, tokenizers.audio
    if modality == "text":
        widths = [("vocab_size", model.vocab_size, tokenizers.vocab.size_head)]
    elif modality == "audio":
        widths = [
            ("audio.levels", model.audio.levels, tokenizers.audio_levels),
            ("audio.codes", model.audio.codes, audio.codes),
            ("audio.speaker_features", model.audio.speaker_features, SPEAKER_FEATURES),
        ]
    else:
        widths = [
            ("visual.bits", model.visual.bits, visual.bits),
            ("visual.patch_pixels", model.visual.patch_pixels, visual.stride),
            ("visual.encoder_channels", model.visual.encoder_channels, visual.feature_channels),
            ("visual.num_scales", model.visual.num_scales, len(visual.sizes)),
            ("visual.image_merge", model.visual.image_merge, SIDE * SIDE),
            ("visual.video_merge", model.visual.video_merge, FRAMES_PER_GROUP * SIDE * SIDE),
        ]
    return [Misfit(key, value, needed) for key, value, needed in widths if value != needed]
