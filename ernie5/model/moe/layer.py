"""The mixture-of-experts layer: route, dispatch, compute, combine, and the always-on shared experts."""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.config import ModelConfig
from ernie5.model.interfaces import LayerInputs, Parcels, Routing, RoutingPool, TokenDispatcher
from ernie5.model.mlp import SwiGLU
from ernie5.model.moe.balance import OWN_TOKENS, LayerRouting, measure_routing
from ernie5.model.moe.dispatch import LocalDispatcher
from ernie5.model.moe.experts import RoutedExperts, kernel_backend
from ernie5.model.moe.router import Router


class MoELayer(nn.Module):
    """sum over chosen experts of weight * expert(x), plus shared(x). Nothing is ever dropped.

    `dispatcher`, `experts` and `pool` are the TokenDispatcher, ExpertCompute and RoutingPool seams.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        self.balance = moe.balance
        backend = kernel_backend(config)
        self.router = Router(moe, width=config.width, backend=backend)
        self.experts = RoutedExperts(moe, width=config.width, backend=config.expert_backend)
        self.shared = (
            SwiGLU(config.width, hidden_width=moe.shared_experts * moe.expert_width) if moe.shared_experts else None
        )
        self.dispatcher: TokenDispatcher = LocalDispatcher(backend)
        self.pool: RoutingPool = OWN_TOKENS

    def forward(self, hidden: torch.Tensor, *, inputs: LayerInputs) -> tuple[torch.Tensor, LayerRouting]:
        """[B, T, D] -> [B, T, D] and the routing's statistics."""
        routing = self.router(hidden.flatten(0, 1), top_k=inputs.top_k, active=inputs.active_experts)
        out = self.run_routed(hidden, routing=routing)
        return out, measure_routing(routing, kinds=inputs.kinds, config=self.balance, pool=self.pool)

    def run_routed(self, hidden: torch.Tensor, *, routing: Routing) -> torch.Tensor:
        """[B, T, D] -> what all experts make of it [B, T, D]."""
        sent = self.dispatcher.send(hidden.flatten(0, 1), routing=routing, num_experts=routing.num_experts)
        beside = None if self.shared is None else self.run_shared(hidden)  # while the tokens may be on their way
        parcels = self.dispatcher.receive(sent)
        out = self.dispatcher.combine(self.run_experts(parcels), parcels=parcels).view_as(hidden)
        return out if beside is None else out + beside

    def run_shared(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> what the shared experts add."""
        return self.shared(hidden)

    def run_experts(self, parcels: Parcels) -> torch.Tensor:
        """The parcels of this rank -> weighted outputs of its experts, summed per parcel [M, D]; nothing travels."""
        return self.experts(parcels.rows, arranged=self.dispatcher.arrange(parcels))
