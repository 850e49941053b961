"""Boxes of tensors, without torch: which part of a whole tensor a rank holds, and how a flat range falls into boxes.

A box is what a checkpoint stores of a tensor as one slice. Every part that a layout makes is a few boxes: a cut along a
dim is one, a cut of a fused matrix one per fused part, a flat range (ZeRO) at most two per dim and one in between.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Box:
    """The elements start[d] <= index[d] < start[d] + shape[d] of a tensor."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def overlap(self, other: Box) -> Box | None:
        """What both have in common, None where that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = (min(a + m, b + n) for a, m, b, n in zip(self.start, self.shape, other.start, other.shape, strict=True))
        shape = tuple(end - first for first, end in zip(start, stop, strict=True))
        return Box(start, shape) if min(shape, default=1) > 0 else None

    def seen_from(self, other: Box) -> Box:
        """The same elements, counted from the first one of `other`."""
        return Box(tuple(a - b for a, b in zip(self.start, other.start, strict=True)), self.shape)

    def describe(self) -> str:
        """`[0:4,16:32]`, which is also how a slice is called in its file."""
        return "[" + ",".join(f"{a}:{a + n}" for a, n in zip(self.start, self.shape, strict=True)) + "]"


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def flat_boxes(shape: tuple[int, ...], *, first: int, stop: int) -> Iterator[Box]:
    """Boxes that together are the elements first..stop of a tensor in row-major order; each is contiguous there, and
    they follow one another."""
    if first >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner, rest = math.prod(shape[1:]), shape[1:]
    (row, begin), (last, end) = divmod(first, inner), divmod(stop, inner)
    if begin:
        upto = end if row == last else inner
        yield from (_in_row(row, box) for box in flat_boxes(rest, first=begin, stop=upto))
        row += 1
    if row < last:
        yield Box((row, *(0 for _ in rest)), (last - row, *rest))
    if end and row <= last:
        yield from (_in_row(last, box) for box in flat_boxes(rest, first=0, stop=end))


def _in_row(row: int, box: Box) -> Box:
    return Box((row, *box.start), (1, *box.shape))


def covers(shape: tuple[int, ...], *, boxes: list[Box]) -> bool:
    """Whether `boxes` are a tensor of `shape`: inside of it, without overlaps, without a gap."""
    whole = whole_box(shape)
    if sum(box.numel for box in boxes) != whole.numel:
        return False
    for box in boxes:
        if len(box.start) != len(shape) or len(box.shape) != len(shape) or min(box.start, default=0) < 0:
            return False
        if box.numel and whole.overlap(box) != box:
            return False
    filled = sorted((box for box in boxes if box.numel), key=lambda box: box.start)
    for index, box in enumerate(filled):
        for other in filled[index + 1 :]:
            if other.start and other.start[0] >= box.start[0] + box.shape[0]:
                break  # sorted: no later one can overlap either
            if box.overlap(other):
                return False
    return True


@dataclasses.dataclass(frozen=True)
class HeldCut:
    """What a rank holds of dim `dim`: in each of its `fused` equal parts, the `size` indices from `first` on."""

    dim: int
    fused: int
    first: int
    size: int


@dataclasses.dataclass(frozen=True)
class HeldPiece:
    """A box of the whole tensor and where it lies in flat local memory: from element `offset` on there are values of
    `shape`; picking `picks` (dim, index), the last dims first, leaves those of the box."""

    box: Box
    offset: int
    shape: tuple[int, ...]
    picks: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Held:
    """A rank's part of a tensor of `shape`, at most one cut per dim."""

    shape: tuple[int, ...]
    cuts: tuple[HeldCut, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return math.prod(size for sizes in self._split_sizes() for size in sizes)

    def pieces(self, *, first: int, stop: int) -> Iterator[HeldPiece]:
        """The elements first..stop of the part, flat, as boxes of the whole; `offset` counts from `first`."""
        sizes = self._split_sizes()
        offset = 0
        for box in flat_boxes(tuple(itertools.chain(*sizes)), first=first, stop=stop):
            fused_dims = [sum(map(len, sizes[:dim])) for dim, split in enumerate(sizes) if len(split) == 2]
            for chosen in itertools.product(*(range(box.shape[dim]) for dim in fused_dims)):
                picks = tuple(zip(fused_dims, chosen, strict=True))
                yield HeldPiece(self._whole(box, picks=dict(picks)), offset, box.shape, picks[::-1])
            offset += box.numel

    def _whole(self, box: Box, *, picks: dict[int, int]) -> Box:
        by_dim = {cut.dim: cut for cut in self.cuts}
        start, shape, place = [], [], 0
        for dim, size in enumerate(self.shape):
            cut = by_dim.get(dim, HeldCut(dim, 1, 0, size))
            base = cut.first
            if cut.fused > 1:
                base += (box.start[place] + picks[place]) * (size // cut.fused)
                place += 1
            start.append(base + box.start[place])
            shape.append(box.shape[place])
            place += 1
        return Box(tuple(start), tuple(shape))

    def _split_sizes(self) -> list[tuple[int, ...]]:
        """The part's shape by dims of the whole; a cut fused dim is two dims."""
        by_dim = {cut.dim: cut for cut in self.cuts}
        sizes = []
        for dim, size in enumerate(self.shape):
            cut = by_dim.get(dim, HeldCut(dim, 1, 0, size))
            sizes.append((cut.fused, cut.size) if cut.fused > 1 else (cut.size,))
        return sizes
