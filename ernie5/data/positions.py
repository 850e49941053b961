"""Uni-RoPE positions (t, h, w) of a document (SPEC section 1, "position" and "mixed sequences").

Text and audio take t = h = w = p, the running position. A visual block that begins behind position p (that of BOI or
BOV) puts cell (i, j) of an n_h x n_w grid of latent frame f at

    t = p + 1 + f        h = p + 1 + (i + 1/2) N_h / n_h - 1/2        w = p + 1 + (j + 1/2) N_w / n_w - 1/2      (1)

with N_h x N_w the picture's finest grid: all scales share one centre-aligned grid. The next token takes
1 + ceil(max of all t, h, w). Fractions are exact enough in fp32: grids have tens of cells.
"""

from __future__ import annotations

import math

import torch


def grid_coordinates(grid: tuple[int, int], *, finest: tuple[int, int]) -> torch.Tensor:
    """Centre-aligned (h, w) of every cell, row-major, [n_h * n_w, 2] fp32; equation (1) without p."""
    axes = [
        (torch.arange(cells, dtype=torch.float64) + 0.5) * full / cells - 0.5
        for cells, full in zip(grid, finest, strict=True)
    ]
    return torch.cartesian_prod(*axes).reshape(-1, 2).float()


class PositionCursor:
    """The running position of one document; `next` is what the next token takes."""

    def __init__(self, *, visual_origin: str = "running") -> None:
        self._origin = visual_origin
        self.next = 0

    def text(self, count: int) -> range:
        """t = h = w of `count` text tokens or audio frames; moves on."""
        self.next += count
        return range(self.next - count, self.next)

    def cells(self, places: torch.Tensor) -> torch.Tensor:
        """Positions of cells at `places` [n, 3] fp32 (latent frame, h, w), [n, 3] fp32; does not move on.

        All blocks of one picture or clip share the origin, which stays put until `leave` is called.
        """
        start = self.next if self._origin == "running" else 0
        return places + torch.tensor([self.next, start, start], dtype=torch.float32)

    def leave(self, positions: torch.Tensor) -> None:
        """Move behind a picture or clip whose blocks took `positions` [n, 3]; nothing happens when n is 0."""
        if len(positions):
            self.next = max(self.next, 1 + math.ceil(float(positions.max())))
