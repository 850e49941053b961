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
from ernie5.data.document import Block
from ernie5.data.positions import grid_coordinates
from ernie5.tokenizers.visual.quantizer import MultiScaleQuantizer, ScaleCodes

Grid = tuple[int, int]


def flip_probabilities(
    num_frames: int, *, num_scales: int, config: CorruptionConfig, generator: torch.Generator
) -> torch.Tensor:
    """Flip probability per frame and scale, [f, S] fp32; equations (1) and (2)."""
    low = config.frame_slope * torch.arange(num_frames, dtype=torch.float32)[:, None]
    drawn = low + config.high * torch.rand(num_frames, num_scales, generator=generator)
    drawn[1:, 0] = drawn[:-1, -1]
    return drawn.clamp(0.0, config.clamp)


def scale_weights(schedule: Sequence[Grid]) -> tuple[float, ...]:
    """Loss weight of one cell per scale: sqrt(area_last / area_k), mean 1 over all cells."""
    areas = [height * width for height, width in schedule]
    raw = [(areas[-1] / area) ** 0.5 for area in areas]
    mean = sum(weight * area for weight, area in zip(raw, areas, strict=True)) / sum(areas)
    return tuple(weight / mean for weight in raw)


def encode_scales(
    latents: torch.Tensor, *, schedule: Sequence[Grid], config: CorruptionConfig | None, generator: torch.Generator
) -> ScaleCodes:
    """Codes of latents [d, f, h, w] fp32, frame by frame (f is the batch of the result); no flips without `config`."""
    frames = latents.movedim(1, 0)
    flips = None
    if config is not None and config.enabled:
        flips = flip_probabilities(len(frames), num_scales=len(schedule), config=config, generator=generator)
    return MultiScaleQuantizer().encode(frames, schedule=schedule, flip_probability=flips, generator=generator)


def picture_blocks(codes: ScaleCodes, *, schedule: Sequence[Grid], num_scales: int) -> tuple[Block, list[Block]]:
    """(scale 1 of frame 0, all further blocks in the order of the layout) of a picture or clip.

    Per frame: scales 2.., then the finished picture (scale index num_scales = S). Scale 1 of a later frame follows the
    finished picture before it as a block of scale 0, which is a target without positions of its own.
    """
    finest, weights, blocks = schedule[-1], scale_weights(schedule), []
    coordinates = [grid_coordinates(grid, finest=finest) for grid in schedule]
    for frame in range(codes.finished.shape[0]):
        for scale in range(len(schedule)):
            blocks.append(
                Block(
                    latents=codes.inputs[scale][frame].flatten(0, 1),
                    coordinates=coordinates[scale],
                    frame=frame,
                    scale=scale,
                    bits=codes.targets[scale][frame].flatten(0, 1),
                    weight=weights[scale],
                )
            )
        finished = codes.finished[frame].flatten(0, 1)
        blocks.append(Block(finished, coordinates[-1], frame=frame, scale=num_scales, bits=None, weight=0.0))
    return blocks[0], blocks[1:]
