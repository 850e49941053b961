"""Pictures and clips to be drawn, flat: the cells of all scales and frames in the order of the layout (SPEC section 2).

Per latent frame: the cells that predict scales 2.. and then the finished picture, whose scale index is S. Scale 1 takes
no cells: BOI or BOV predicts that of the first frame, the last cell of a finished picture that of the next.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch

from ernie5.data.positions import grid_coordinates
from ernie5.tokenizers.visual.quantizer import ScaleCodes

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class DrawingPlan:
    """What depends on the grids alone; n cells, m predicted cells, the first of them scale 1 of frame 0.

    places [n, 3] fp32: latent frame and centre-aligned (h, w); scales [n] int64: the scale a cell predicts, S for a
    finished picture; starts [n] int64 (numpy): first cell of the own block; bit_rows [m] int64: the cell that predicts,
    -1 for BOI or BOV; bit_scales [m] int64, weights [m] fp32: the predicted scale and its loss weight.
    """

    num_frames: int
    places: torch.Tensor
    scales: torch.Tensor
    starts: np.ndarray
    bit_rows: torch.Tensor
    bit_scales: torch.Tensor
    weights: torch.Tensor

    @property
    def cells_per_frame(self) -> int:
        """Cells of one latent frame."""
        return len(self.scales) // self.num_frames


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Content of a plan's cells: latents [n, d], the history as the model is to see it; bits [m, d], the targets."""

    plan: DrawingPlan
    latents: torch.Tensor
    bits: torch.Tensor


def scale_weights(schedule: Sequence[Grid]) -> tuple[float, ...]:
    """Loss weight of one cell per scale: sqrt(area_last / area_k), mean 1 over all cells."""
    areas = [height * width for height, width in schedule]
    raw = [(areas[-1] / area) ** 0.5 for area in areas]
    mean = sum(weight * area for weight, area in zip(raw, areas, strict=True)) / sum(areas)
    return tuple(weight / mean for weight in raw)


def draw_codes(codes: ScaleCodes, *, schedule: Sequence[Grid], num_scales: int) -> Drawing:
    """The cells of a picture or clip from its codes, whose batch axis counts latent frames. num_scales: S."""
    frames = codes.finished.shape[0]
    seen = [part.flatten(1, 2) for part in (*codes.inputs[1:], codes.finished)]
    return Drawing(
        plan=plan_drawing(tuple(schedule), num_frames=frames, num_scales=num_scales),
        latents=torch.cat(seen, dim=1).flatten(0, 1),
        bits=torch.cat([part.flatten(1, 2) for part in codes.targets], dim=1).flatten(0, 1),
    )


@functools.lru_cache(maxsize=256)
def plan_drawing(schedule: tuple[Grid, ...], *, num_frames: int, num_scales: int) -> DrawingPlan:
    """The plan of `num_frames` latent frames over `schedule`; a finished picture gets scale index num_scales."""
    counts = [height * width for height, width in schedule]
    blocks = [*counts[1:], counts[-1]]
    finest, per_frame, per_target = schedule[-1], sum(blocks), sum(counts)
    coordinates = torch.cat([grid_coordinates(grid, finest=finest) for grid in (*schedule[1:], finest)])
    frames = torch.arange(num_frames).repeat_interleave(per_frame)
    first_cells = np.repeat(np.cumsum([0, *blocks[:-1]]), blocks)
    # Scale 1 is predicted by the cell before the frame's own, all other scales by their own cells.
    rows = torch.arange(-counts[0], per_target - counts[0])
    offsets = torch.arange(num_frames).repeat_interleave(per_target) * per_frame
    own_scales = torch.tensor([*range(1, len(schedule)), num_scales]).repeat_interleave(torch.tensor(blocks))
    bit_scales = torch.arange(len(schedule)).repeat_interleave(torch.tensor(counts))
    weights = torch.tensor(scale_weights(schedule)).repeat_interleave(torch.tensor(counts))
    return DrawingPlan(
        num_frames=num_frames,
        places=torch.cat([frames[:, None].float(), coordinates.repeat(num_frames, 1)], dim=1),
        scales=own_scales.repeat(num_frames),
        starts=np.concatenate([first_cells + frame * per_frame for frame in range(num_frames)]),
        bit_rows=rows.repeat(num_frames) + offsets,
        bit_scales=bit_scales.repeat(num_frames),
        weights=weights.repeat(num_frames),
    )
