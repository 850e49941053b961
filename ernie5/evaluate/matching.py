"""Nearest-target tests: is a generated item nearer to its own target than to another one? Chance is one half."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ernie5.data.draws import torch_seed


def other_indices(count: int, *, seed: int) -> list[int]:
    """For every item another one, drawn evenly from the rest by `seed`; needs at least two items."""
    generator = torch.Generator().manual_seed(torch_seed(seed))
    shifts = torch.randint(1, max(count, 2), (count,), generator=generator)
    return [(index + int(shift)) % count for index, shift in enumerate(shifts)]


def picture_distance(left: torch.Tensor, *, right: torch.Tensor) -> float:
    """Root mean square difference of two feature maps of equal shape."""
    return float((left.double() - right.double()).square().mean().sqrt())


def sequence_distance(left: torch.Tensor, *, right: torch.Tensor) -> float:
    """Dynamic time warping over frames: left [n, A], right [m, A] -> cost of the best path / (n + m).

    Speech keeps its identity when it is said a little faster, which a frame-by-frame difference would punish (Sakoe
    and Chiba 1978, the symmetric form: a diagonal step costs twice). An empty side is infinitely far.
    """
    if len(left) == 0 or len(right) == 0:
        return float("inf")
    cost = torch.cdist(left.double(), right.double()).numpy()
    rows, columns = cost.shape
    best = np.full((rows + 1, columns + 1), np.inf)
    best[0, 0] = 0.0
    # Cells of one anti-diagonal depend only on the two before it, so each is one vector operation.
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        here = cost[i - 1, j - 1]
        straight = np.minimum(best[i - 1, j], best[i, j - 1]) + here
        best[i, j] = np.minimum(straight, best[i - 1, j - 1] + 2 * here)
    return float(best[rows, columns] / (rows + columns))


def own_is_nearer(own: Sequence[float], *, other: Sequence[float]) -> float:
    """Part of the cases whose own target is nearer; a tie counts half."""
    wins = [1.0 if a < b else 0.5 if a == b else 0.0 for a, b in zip(own, other, strict=True)]
    return sum(wins) / max(len(wins), 1)
