"""Rows and weights on their way in an uneven all-to-all, which other work may run beside, forward and backward.

Two autograd nodes: one departs, one arrives. What is computed between them in forward has its gradients computed
between them in backward too, because autograd runs nodes in the reverse order of their creation: there the node that
arrived starts the reverse all-to-all, and the node that departed waits for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ernie5.parallel.collectives import all_to_all, start_all_to_all
from ernie5.parallel.state import Axis


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
    """rows [M, D] and weights [M, K] that have arrived, or will have when `wait` returns them."""

    def __init__(self, rows: torch.Tensor, weights: torch.Tensor, *, journey: Journey | None = None) -> None:
        self._rows, self._weights, self._journey = rows, weights, journey

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, weights), to be called once."""
        if self._journey is None:
            return self._rows, self._weights
        return _Arrive.apply(self._rows, self._weights, self._journey)


def start_exchange(
    rows: torch.Tensor,
    *,
    weights: torch.Tensor,
    axis: Axis,
    send: Sequence[int],
    receive: Sequence[int],
    is_async: bool,
) -> Exchange:
    """Send rows [M, D] and weights [M, K] as all_to_all does, both differentiable; is_async: without waiting.

    The same nodes for both: backward then issues its two collectives in the same order on every rank.
    """
    if axis.size == 1:
        return Exchange(rows, weights)
    journey = Journey(axis, tuple(send), tuple(receive), is_async)
    return Exchange(*_Depart.apply(rows, weights, journey), journey=journey)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, journey):
        ctx.journey = journey
        return (
            journey.start(rows, is_back=False, what="hidden"),
            journey.start(weights, is_back=False, what="weights"),
        )

    @staticmethod
    def backward(ctx, *_):
        journey = ctx.journey
        journey.finish()
        rows, weights = journey.returned
        journey.returned.clear()
        return rows, weights, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, journey):
        ctx.journey = journey
        journey.finish()
        return rows.view_as(rows), weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad_rows, grad_weights):
        journey = ctx.journey
        journey.returned += [
            journey.start(grad_rows, is_back=True, what="hidden"),
            journey.start(grad_weights, is_back=True, what="weights"),
        ]
        return grad_rows, grad_weights, None  # of the right shape; the other node reads what has returned instead
