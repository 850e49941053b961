"""Which box of every parameter a rank holds, and which of the ranks that hold equal copies saves it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping

from ernie5.parallel.apply import Layout, plan_shards
from ernie5.parallel.boxes import Held, HeldCut
from ernie5.parallel.collectives import even_sizes
from ernie5.parallel.dims import AXES, GridDims
from ernie5.parallel.stages import StagePlan
from ernie5.parallel.state import Axis, Traffic


def held_parts(layout: Layout) -> dict[str, Held]:
    """This rank's part of every parameter of its pipeline stage, by name."""
    return {name: _held(layout, name=name) for name in layout.shards if layout.is_here(name)}


def _held(layout: Layout, *, name: str) -> Held:
    shard = layout.shards[name]
    cuts = []
    for cut in shard.cuts:
        axis = layout.state.axis(cut.axis)
        sizes = even_sizes(shard.shape[cut.dim] // cut.fused, axis=axis)
        cuts.append(HeldCut(cut.dim, cut.fused, sum(sizes[: axis.coordinate]), sizes[axis.coordinate]))
    return Held(shard.shape, tuple(cuts))


def written_names(layout: Layout, *, parts: dict[str, Held], partition_axes: Collection[str] = ()) -> set[str]:
    """The parameters that this rank saves: ranks with equal copies share them, the largest first, by bytes.

    partition_axes: axes whose ranks do not hold copies after all, because an optimizer is partitioned over them.
    """
    by_axes: dict[tuple[str, ...], list[str]] = {}
    for name in parts:
        if not layout.is_first_stage(name):
            continue
        copies = tuple(axis for axis in layout.shards[name].copy_axes if axis not in partition_axes)
        by_axes.setdefault(copies, []).append(name)
    mine = set()
    for axes, names in by_axes.items():
        own = 0
        for axis in (layout.state.axis(name) for name in axes):
            own = own * axis.size + axis.coordinate
        loads = [(0, index) for index in range(math.prod(layout.state.axis(name).size for name in axes))]
        for name in sorted(names, key=lambda name: (-parts[name].numel, name)):
            load, index = loads[0]
            heapq.heapreplace(loads, (load + parts[name].numel, index))
            if index == own:
                mine.add(name)
    return mine


class GridPlace:
    """One rank's coordinates in grids that do not run: what a Layout needs to say who would hold what."""

    def __init__(self, dims: GridDims, *, rank: int) -> None:
        self.dims, self.rank = dims, rank
        groups = {name: dims.group(rank, axis=name) for name in AXES}
        self._axes = {
            name: Axis(name, ranks, ranks.index(rank), None, Traffic(), ranks) for name, ranks in groups.items()
        }

    def axis(self, name: str) -> Axis:
        """The rank's place along an axis, without a process group."""
        return self._axes[name]


def planned_layout(shapes: Mapping[str, tuple[int, ...]], *, place: GridPlace, stages: StagePlan) -> Layout:
    """The layout of the parameters of `shapes` as the rank at `place` would see it."""
    return Layout(place, stages=stages, shards=plan_shards(shapes, place=place, stages=stages))
