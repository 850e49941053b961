"""Arithmetic of the rank grids, without torch: who is where, and who belongs to which group.

The same ranks are factored twice (parallel folding, arXiv:2504.14960), the last axis of each grid varying fastest:

    attention grid   pp x dp  x cp x tp         with tp = keys * key_copies
    expert grid      pp x edp x ep x etp        with edp = dp * cp * tp / (ep * etp)

Both grids have the same pipeline stages, so that a stage's experts and attention are on the same ranks. A model with
fewer key heads than tensor-parallel ranks has each of them on key_copies neighbouring ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

ATTENTION_GRID = ("pp", "dp", "cp", "keys", "key_copies")
EXPERT_GRID = ("pp", "edp", "ep", "etp")
AXES = {
    "pp": (ATTENTION_GRID, ("pp",)),
    "dp": (ATTENTION_GRID, ("dp",)),
    "cp": (ATTENTION_GRID, ("cp",)),
    "tp": (ATTENTION_GRID, ("keys", "key_copies")),
    "keys": (ATTENTION_GRID, ("keys",)),
    "key_copies": (ATTENTION_GRID, ("key_copies",)),
    "dp_cp": (ATTENTION_GRID, ("dp", "cp")),
    "stage": (ATTENTION_GRID, ("dp", "cp", "keys", "key_copies")),
    "model": (ATTENTION_GRID, ("pp", "keys", "key_copies")),
    "block": (EXPERT_GRID, ("ep", "etp")),
    "edp": (EXPERT_GRID, ("edp",)),
    "ep": (EXPERT_GRID, ("ep",)),
    "etp": (EXPERT_GRID, ("etp",)),
}
"""Every named axis: the grid it lies in, and the grid's factors that vary within one of its groups."""


@dataclasses.dataclass(frozen=True)
class GridDims:
    """Degrees of both grids; raises ValueError where they do not factor the same number of ranks."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    key_copies: int = 1

    def __post_init__(self) -> None:
        if self.tp % self.key_copies:
            raise ValueError(f"{self.key_copies} copies of every key head do not divide tp = {self.tp}")
        if self.stage_size % (self.ep * self.etp):
            raise ValueError(f"ep x etp = {self.ep} x {self.etp} does not divide dp x cp x tp = {self.stage_size}")

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """Replicas of every expert."""
        return self.stage_size // (self.ep * self.etp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.pp * self.stage_size

    def size(self, axis: str) -> int:
        """Ranks in one group of `axis`."""
        grid, factors = AXES[axis]
        return math.prod(self._sizes(grid)[grid.index(factor)] for factor in factors)

    def coordinate(self, rank: int, *, axis: str) -> int:
        """Place of `rank` within its group of `axis`."""
        return self.group(rank, axis=axis).index(rank)

    def group(self, rank: int, *, axis: str) -> tuple[int, ...]:
        """The ranks of `rank`'s group of `axis`, in order of their coordinates."""
        return next(group for group in self.groups(axis) if rank in group)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups of `axis`: a partition of all ranks, the same on every rank and in the same order."""
        grid, factors = AXES[axis]
        sizes = self._sizes(grid)
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(itertools.product(*map(range, sizes))):
            fixed = tuple(value for name, value in zip(grid, place, strict=True) if name not in factors)
            found.setdefault(fixed, []).append(rank)
        return tuple(tuple(group) for group in found.values())

    def describe(self) -> str:
        """`dp2 cp1 tp1 pp1 | edp1 ep2 etp1`, for messages and logs."""
        attention = " ".join(f"{name}{self.size(name)}" for name in ("dp", "cp", "tp", "pp"))
        return f"{attention} | " + " ".join(f"{name}{self.size(name)}" for name in ("edp", "ep", "etp"))

    def _sizes(self, grid: tuple[str, ...]) -> tuple[int, ...]:
        degrees = {**vars(self), "edp": self.edp, "keys": self.tp // self.key_copies}
        return tuple(degrees[name] for name in grid)


def nearest_divisors(number: int, *, wanted: int) -> tuple[int, ...]:
    """The divisors of `number` just below and just above `wanted` (itself where it divides)."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    if wanted in divisors:
        return (wanted,)
    below = [d for d in divisors if d < wanted]
    above = [d for d in divisors if d > wanted]
    return (*below[-1:], *above[:1])
