"""Tokens to experts and back on one device: ordered once per layer, then contiguous segments.

Every token has exactly K rows, so gathering rows and summing rows per token are adjoint to each other: neither pass
needs a scattered addition.
"""

from __future__ import annotations

import torch

from ernie5.model.interfaces import DispatchedRows, Parcels, Routing
from ernie5_kernels.moe_permute import plan_permutation
from ernie5_kernels.token_rows import gather_rows, sum_places


class SpreadRows(torch.autograd.Function):
    """rows[r] = x[sources[r]]; the gradient of x[n] is the sum over the rows places[n]."""

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, sources: torch.Tensor, places: torch.Tensor, backend: str = "auto"
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.backend = backend
        return gather_rows(x, sources=sources, places=places, backend=backend)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return sum_places(grad, places=ctx.saved_tensors[0], backend=ctx.backend), None, None, None


class GatherRows(torch.autograd.Function):
    """out[n] = sum over k of rows[places[n, k]]; the gradient of rows[r] is that of its token."""

    @staticmethod
    def forward(
        ctx, rows: torch.Tensor, sources: torch.Tensor, places: torch.Tensor, backend: str = "auto"
    ) -> torch.Tensor:
        ctx.save_for_backward(sources, places)
        ctx.backend = backend
        return sum_places(rows, places=places, backend=backend)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sources, places = ctx.saved_tensors
        return gather_rows(grad, sources=sources, places=places, backend=ctx.backend), None, None, None


class LocalDispatcher:
    """The TokenDispatcher of a process that holds every expert: nothing travels, a token is its own parcel.

    backend: of the kernels that order and move the rows.
    """

    def __init__(self, backend: str = "auto") -> None:
        self._backend = backend

    def send(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> Parcels:
        """The tokens as they are."""
        return Parcels(hidden, routing.choices, routing.weights, num_experts)

    def receive(self, sent: Parcels) -> Parcels:
        """They are here."""
        return sent

    def arrange(self, parcels: Parcels) -> DispatchedRows:
        """Order the N*K choices by expert; within an expert the order of tokens stays."""
        plan = plan_permutation(parcels.ids, num_experts=parcels.num_experts, backend=self._backend)
        row_weights = SpreadWeights.apply(parcels.weights.flatten(), plan.places.flatten())
        rows = SpreadRows.apply(parcels.rows, plan.sources, plan.places, self._backend)
        return DispatchedRows(
            rows=rows, row_weights=row_weights, offsets=plan.offsets, sources=plan.sources, places=plan.places
        )

    def arrange_back(self, rows: torch.Tensor, *, dispatched: DispatchedRows) -> torch.Tensor:
        """Sum each token's K rows."""
        return GatherRows.apply(rows, dispatched.sources, dispatched.places, self._backend)

    def combine(self, outputs: torch.Tensor, *, parcels: Parcels) -> torch.Tensor:
        """The sums are where they belong."""
        return outputs


class SpreadWeights(torch.autograd.Function):
    """rows[places[n]] = weights[n] for places that are a permutation, and its inverse as gradient."""

    @staticmethod
    def forward(ctx, weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return torch.empty_like(weights).scatter_(0, places, weights)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None
