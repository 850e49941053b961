"""The slices of an engine's state, as views of live memory: what a rank saves, and where loading writes to."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ernie5.engine.interface import BUFFER, MOMENT, PARAMETER, StateSlice
from ernie5.parallel.boxes import Held, whole_box


def part_slices(
    flat: torch.Tensor, *, kind: str, key: str, held: Held, is_written: bool, first: int = 0
) -> Iterator[StateSlice]:
    """`flat` [n], the elements first.. of this rank's part of a tensor, as boxes of the whole one."""
    for piece in held.pieces(first=first, stop=first + flat.numel()):
        size = torch.Size(piece.shape).numel()
        values = flat[piece.offset : piece.offset + size].view(piece.shape)
        for dim, index in piece.picks:
            values = values.select(dim, index)
        yield StateSlice(kind=kind, key=key, shape=held.shape, box=piece.box, values=values, is_written=is_written)


def buffer_slices(model: torch.nn.Module, *, is_written: bool) -> Iterator[StateSlice]:
    """The buffers that a checkpoint keeps; they are whole on every rank that has them."""
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in kept:
            shape = tuple(buffer.shape)
            yield StateSlice(
                kind=BUFFER, key=name, shape=shape, box=whole_box(shape), values=buffer.detach(), is_written=is_written
            )


def optimizer_slices(
    optimizer: torch.optim.Optimizer, *, master: torch.Tensor, name: str, held: Held, is_written: bool
) -> Iterator[StateSlice]:
    """A master and its moments, where the optimizer keeps them in the master's shape; what has another shape (scales of
    8-bit moments, which whole masters alone have) as a whole tensor of its own."""
    flat = master.detach().view(-1)
    yield from part_slices(flat, kind=PARAMETER, key=name, held=held, is_written=is_written)
    for kind, value in optimizer.state[master].items():
        if kind != "step":
            flat, key = value.detach().view(-1), f"{kind}/{name}"
            own = held if value.shape == master.shape else Held(tuple(value.shape))
            yield from part_slices(flat, kind=MOMENT, key=key, held=own, is_written=is_written)
