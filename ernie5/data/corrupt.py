"""Blocks of a picture or clip to be drawn, with the corrupted history of SPEC section 2.

Scale k of latent frame t flips every accumulated bit with p_tk, drawn once per scale:

    p_tk ~ U(c t, P + c t), clamped to [0, p_max]        c = frame_slope, P = high                              (1)
    p_t0 = p_{t-1, S-1} for t > 0: the first scale of a frame leans on the finished frame before it             (2)

The quantiser takes the residual against the corrupted sum, so that the targets of later scales correct the flips. The
loss weight of a cell of scale k is sqrt(area_S / area_k), scaled to mean 1 over the medium's cells (early scales
decide more of the picture, and have fewer cells).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ernie5.data.config import CorruptionConfig
from ernie5.tokenizers.visual.quantizer import MultiScaleQuantizer, ScaleCodes

Grid = tuple[int, int]


def flip_probabilities(
    num_frames: int, *, num_scales: int, config: CorruptionConfig, generator: torch.Generator
) -> torch.Tensor:
    """Flip probability per frame and scale, [f, S] fp32; equations (1) and (2)."""
    low = config.frame_slope * torch.arange(num_frames, dtype=torch.float32)[:, None]
    drawn = low + config.high * torch.rand(num_frames, num_scales, generator=generator)
    for frame in range(1, num_frames):  # one by one: with a single scale it is the same number that is handed on
        drawn[frame, 0] = drawn[frame - 1, -1]
    return drawn.clamp(0.0, config.clamp)


def encode_scales(
    latents: torch.Tensor, *, schedule: Sequence[Grid], config: CorruptionConfig | None, generator: torch.Generator
) -> ScaleCodes:
    """Codes of latents [d, f, h, w] fp32, frame by frame (f is the batch of the result); no flips without `config`."""
    frames = latents.movedim(1, 0)
    flips = None
    if config is not None and config.enabled:
        flips = flip_probabilities(len(frames), num_scales=len(schedule), config=config, generator=generator)
    return MultiScaleQuantizer().encode(frames, schedule=schedule, flip_probability=flips, generator=generator)
