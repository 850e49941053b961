"""All routed experts of a layer as two stacked weights and one operator."""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.config import MoEConfig
from ernie5_kernels.experts import experts


class RoutedExperts(nn.Module):
    """E SwiGLU experts: gate_up [E, 2F, D] (gate first) and down [E, D, F], the layout of transformers' ERNIE 4.5."""

    def __init__(self, config: MoEConfig, *, width: int, backend: str) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_width, width))
        self.down = nn.Parameter(torch.empty(config.num_experts, width, config.expert_width))
        self.backend = backend

    def forward(
        self, rows: torch.Tensor, *, row_weights: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor:
        """rows [R, D] grouped by expert, row_weights [R], offsets [E] -> weighted outputs [R, D]."""
        return experts(
            rows, row_weights=row_weights, gate_up=self.gate_up, down=self.down, offsets=offsets, backend=self.backend
        )
