"""Grids of the scales of a latent picture, and the one resize that carries latents between grids.

The largest square grid of the default sizes is 8x8: (1, 2, 3, 4, 6, 8) give 1+4+9+16+36+64 = 130 cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from ernie5.errors import TokenizerError

DEFAULT_SIZES = (1, 2, 3, 4, 6, 8)


def scale_schedule(height: int, width: int, *, sizes: Sequence[int] = DEFAULT_SIZES) -> tuple[tuple[int, int], ...]:
    """(h_k, w_k) per scale of a height x width latent grid; the first is (1, 1), the last (height, width).

    Let n be the longer side. Sizes below n are kept, then n itself closes the schedule; a grid larger than the last
    size stretches all sizes by n / sizes[-1]. Each size s becomes (max(1, round(s*h/n)), max(1, round(s*w/n))), and
    equal neighbours are merged. Raises TokenizerError for an empty grid or sizes that do not ascend from 1.
    """
    if min(height, width) < 1:
        raise TokenizerError(f"A latent grid of {height}x{width} cells has no scales: both sides must be at least 1.")
    if not sizes or sizes[0] != 1 or list(sizes) != sorted(set(sizes)):
        raise TokenizerError(f"Scale sizes {tuple(sizes)} must ascend from 1: the first scale is always one cell.")
    longer = max(height, width)
    stretch = max(1.0, longer / sizes[-1])
    kept = [1.0] + [s * stretch for s in sizes[1:] if s * stretch < longer] + ([longer] if longer > 1 else [])
    grids = [(max(1, round(s * height / longer)), max(1, round(s * width / longer))) for s in kept]
    return tuple(grid for k, grid in enumerate(grids) if k == 0 or grid != grids[k - 1])


def num_cells(schedule: Sequence[tuple[int, int]]) -> int:
    """Cells of all scales together: the number of positions that a generated frame takes, without the finished one."""
    return sum(height * width for height, width in schedule)


def resize_to(latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resize [..., d, h, w] to [..., d, *grid]: area average where both sides shrink or stay, else bilinear.

    Any ratio works, fractional ones included (6 -> 8, 8 -> 3). Bilinear is `align_corners=False`, so that cell centres
    lie on one centre-aligned grid, like the positions of SPEC section 1. Constants stay constant both ways.
    """
    if tuple(latents.shape[-2:]) == tuple(grid):
        return latents
    lead, shape = latents.shape[:-3], latents.shape[-3:]
    flat = latents.reshape(-1, *shape)
    if grid[0] <= shape[1] and grid[1] <= shape[2]:
        flat = functional.interpolate(flat, size=grid, mode="area")
    else:
        flat = functional.interpolate(flat, size=grid, mode="bilinear", align_corners=False)
    return flat.reshape(*lead, shape[0], *grid)
