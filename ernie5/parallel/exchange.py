"""Rows, and weights with them, on their way in an uneven all-to-all that other work may run beside, both passes.

Two autograd nodes: one departs, one arrives. What is computed between them in forward has its gradients computed
between them in backward too, because autograd runs nodes in the reverse order of their creation: there the node that
arrived starts the reverse all-to-all, and the node that departed waits for it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ernie5.parallel.collectives import all_to_all, start_all_to_all
from ernie5.parallel.state import Axis
from ernie5_kernels.checks import first_order

LOAD = ("hidden", "weights")
"""What travels, in this order, as bytes are counted."""
only_first = functools.partial(first_order, way_out="Set parallel.ep: 1, where nothing travels")


@dataclasses.dataclass
class Journey:
    """What both nodes know. works: the running all-to-alls; luggage: tensors that they read, kept until they end;
    returned: gradients that travel back, or have travelled."""

    axis: Axis
    send: tuple[int, ...]
    receive: tuple[int, ...]
    is_async: bool
    works: list[dist.Work] = dataclasses.field(default_factory=list)
    luggage: list[torch.Tensor] = dataclasses.field(default_factory=list)
    returned: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def start(self, x: torch.Tensor, *, is_back: bool, what: str) -> torch.Tensor:
        """The tensor that will hold the received rows of x."""
        send, receive = (self.receive, self.send) if is_back else (self.send, self.receive)
        if not self.is_async:
            return all_to_all(x, axis=self.axis, send=send, receive=receive, what=what)
        x = x.contiguous()
        out, work = start_all_to_all(x, axis=self.axis, send=send, receive=receive, what=what)
        self.works.append(work)
        self.luggage.append(x)
        return out

    def finish(self) -> None:
        """Wait for all that was started."""
        for work in self.works:
            work.wait()
        self.works.clear()
        self.luggage.clear()


class Exchange:
    """Tensors that have arrived, or will have when `wait` returns them: rows [M, D], or they and weights [M, K]."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], *, journey: Journey | None = None) -> None:
        self._tensors, self._journey = tensors, journey

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The same tensors, to be called once."""
        if self._journey is None:
            return self._tensors
        return _Arrive.apply(self._journey, *self._tensors)


def start_exchange(
    rows: torch.Tensor,
    *,
    axis: Axis,
    send: Sequence[int],
    receive: Sequence[int],
    is_async: bool,
    weights: torch.Tensor | None = None,
) -> Exchange:
    """Send rows [M, D] and weights [M, K] as all_to_all does, both differentiable; is_async: without waiting.

    The same nodes for both: backward then issues its two collectives in the same order on every rank.
    """
    tensors = (rows,) if weights is None else (rows, weights)
    if axis.size == 1:
        return Exchange(tensors)
    journey = Journey(axis, tuple(send), tuple(receive), is_async)
    return Exchange(_Depart.apply(journey, *tensors), journey=journey)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, journey, *tensors):
        ctx.journey = journey
        return tuple(journey.start(x, is_back=False, what=what) for x, what in zip(tensors, LOAD))

    @staticmethod
    @only_first
    def backward(ctx, *_):
        journey = ctx.journey
        journey.finish()
        returned = tuple(journey.returned)
        journey.returned.clear()
        return None, *returned


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, journey, *tensors):
        ctx.journey = journey
        journey.finish()
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    @only_first
    def backward(ctx, *grads):
        journey = ctx.journey
        journey.returned += [journey.start(grad, is_back=True, what=what) for grad, what in zip(grads, LOAD)]
        return None, *grads  # of the right shapes; the other node reads what has returned instead
