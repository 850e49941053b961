"""Tokens to experts and back on one device: one sort per layer, then contiguous segments.

Every token has exactly K rows, so gathering rows and summing rows per token are adjoint to each other: neither pass
needs a scattered addition.
"""

from __future__ import annotations

import torch

from ernie5.model.interfaces import DispatchedRows, Parcels, Routing
from ernie5_kernels.token_rows import gather_rows, sum_places


class SpreadRows(torch.autograd.Function):
    """rows[r] = x[sources[r]]; the gradient of x[n] is the sum over the rows places[n]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return gather_rows(x, sources=sources)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return sum_places(grad, places=ctx.saved_tensors[0]), None, None


class GatherRows(torch.autograd.Function):
    """out[n] = sum over k of rows[places[n, k]]; the gradient of rows[r] is that of its token."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(sources)
        return sum_places(rows, places=places)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather_rows(grad, sources=ctx.saved_tensors[0]), None, None


class LocalDispatcher:
    """The TokenDispatcher of a process that holds every expert: nothing travels, a token is its own parcel."""

    def send(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> Parcels:
        """The tokens as they are."""
        return Parcels(hidden, routing.choices, routing.weights, num_experts)

    def receive(self, sent: Parcels) -> Parcels:
        """They are here."""
        return sent

    def arrange(self, parcels: Parcels) -> DispatchedRows:
        """Sort the N*K choices by expert (stable, so that the order of tokens within an expert is fixed)."""
        num_tokens, top_k = parcels.ids.shape
        flat = parcels.ids.flatten()
        ordered, order = torch.sort(flat, stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.numel(), device=order.device)
        sources = order // top_k
        experts = torch.arange(parcels.num_experts, device=flat.device)
        offsets = torch.searchsorted(ordered, experts, right=True)
        row_weights = SpreadWeights.apply(parcels.weights.flatten(), order, places)
        places = places.view(num_tokens, top_k)
        rows = SpreadRows.apply(parcels.rows, sources, places)
        return DispatchedRows(rows=rows, row_weights=row_weights, offsets=offsets, sources=sources, places=places)

    def arrange_back(self, rows: torch.Tensor, *, dispatched: DispatchedRows) -> torch.Tensor:
        """Sum each token's K rows."""
        return GatherRows.apply(rows, dispatched.sources, dispatched.places)

    def combine(self, outputs: torch.Tensor, *, parcels: Parcels) -> torch.Tensor:
        """The sums are where they belong."""
        return outputs


class SpreadWeights(torch.autograd.Function):
    """A permutation of one number per row, and its inverse as gradient."""

    @staticmethod
    def forward(ctx, weights: torch.Tensor, order: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return weights.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
