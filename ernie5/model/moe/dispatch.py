"""Tokens to experts and back on one device: ordered once per layer, then contiguous segments."""

from __future__ import annotations

import torch

from ernie5.model.interfaces import ArrangedRows, Parcels, Routing
from ernie5_kernels.moe_permute import plan_permutation
from ernie5_kernels.token_rows import RowPlan


class LocalDispatcher:
    """The TokenDispatcher of a process that holds every expert: nothing travels, a token is its own parcel.

    backend: of the kernel that orders the rows.
    """

    def __init__(self, backend: str = "auto") -> None:
        self._backend = backend

    def send(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> Parcels:
        """The tokens as they are."""
        return Parcels(hidden, routing.choices, routing.weights, num_experts)

    def receive(self, sent: Parcels) -> Parcels:
        """They are here."""
        return sent

    def arrange(self, parcels: Parcels) -> ArrangedRows:
        """Order the N*K choices by expert; within an expert the order of tokens stays."""
        order = plan_permutation(parcels.ids, num_experts=parcels.num_experts, backend=self._backend)
        row_weights = SpreadWeights.apply(parcels.weights.flatten(), order.places.flatten())
        return ArrangedRows(row_weights, order.offsets, RowPlan(order.sources, order.places, checks=False))

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
