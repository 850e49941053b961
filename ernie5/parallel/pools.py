"""Statistics of routing where the tokens of a row are spread over ranks: losses of balance are those of whole rows.

The switch and sequence losses multiply two means over tokens, so the losses of parts do not add up to that of the
whole. Each rank therefore gathers the scores and computes the whole; only where such a loss is switched on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ernie5.model.interfaces import Routing, RoutingPool
from ernie5.parallel.collectives import all_gather, all_reduce, gather, gather_for_work
from ernie5.parallel.state import Axis

TOKEN_DIM = 1


class SequencePool:
    """Tokens split over tp ranks, which all compute and report the same objective."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def loads(self, group_loads: torch.Tensor) -> torch.Tensor:
        """Summed over the ranks, hence equal on all: a tp group reports once."""
        return all_reduce(group_loads, axis=self._axis)

    def whole(self, routing: Routing, *, kinds: torch.Tensor) -> tuple[Routing, torch.Tensor]:
        """The routing of whole rows; each rank's objective has the whole gradient."""
        return _join(routing, kinds=kinds, axis=self._axis, join=gather)


class ContextPool:
    """Tokens split over cp ranks, each of which reports a share of the objective in proportion to its tokens; `inner`
    is the pool of the tokens within one cp rank."""

    def __init__(self, axis: Axis, *, inner: RoutingPool) -> None:
        self._axis, self._inner = axis, inner

    def loads(self, group_loads: torch.Tensor) -> torch.Tensor:
        """Those of this rank's tokens: the engine sums over cp."""
        return self._inner.loads(group_loads)

    def whole(self, routing: Routing, *, kinds: torch.Tensor) -> tuple[Routing, torch.Tensor]:
        """The routing of whole rows; the gradients of all shares come together."""
        routing, kinds = self._inner.whole(routing, kinds=kinds)
        return _join(routing, kinds=kinds, axis=self._axis, join=gather_for_work)


def _join(
    routing: Routing, *, kinds: torch.Tensor, axis: Axis, join: Callable[..., torch.Tensor]
) -> tuple[Routing, torch.Tensor]:
    """Routing [B t, ...] and kinds [B, t] of this rank's tokens -> those of all ranks' tokens, row by row; `join` is
    the gathering with the gradient that fits."""
    rows, mine = kinds.shape
    sizes = all_gather(torch.tensor([mine], device=kinds.device), axis=axis, sizes=[1] * axis.size).tolist()

    def joined(x: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        return function(x.unflatten(0, (rows, mine)), axis=axis, sizes=sizes, dim=TOKEN_DIM).flatten(0, 1)

    whole = Routing(
        choices=joined(routing.choices, all_gather),
        weights=routing.weights,
        num_experts=routing.num_experts,
        scores=joined(routing.scores, join),
        logits=joined(routing.logits, join),
    )
    return whole, all_gather(kinds, axis=axis, sizes=sizes, dim=TOKEN_DIM)
