"""All routed experts of a layer as two stacked weights and one operator."""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.config import ModelConfig, MoEConfig
from ernie5.model.interfaces import ArrangedRows
from ernie5_kernels.experts import experts

FP8 = {"triton_fp8": "triton", "deepgemm_fp8": "deepgemm"}
ROUTED_BY = {"triton_fp8": "triton", "deepgemm_fp8": "auto", "native": "auto", "megablocks": "auto"}


def kernel_backend(config: ModelConfig) -> str:
    """The back end of the router and of the order of rows that goes with the experts' one."""
    return ROUTED_BY.get(config.expert_backend, config.expert_backend)


class RoutedExperts(nn.Module):
    """E SwiGLU experts: gate_up [E, 2F, D] (gate first) and down [E, D, F], the layout of transformers' ERNIE 4.5."""

    def __init__(self, config: MoEConfig, *, width: int, backend: str) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_width, width))
        self.down = nn.Parameter(torch.empty(config.num_experts, width, config.expert_width))
        self.backend, self.fp8 = FP8.get(backend, backend), backend in FP8

    def forward(self, parcels: torch.Tensor, *, arranged: ArrangedRows) -> torch.Tensor:
        """parcels [M, D] -> the weighted sum of what their experts make of each [M, D]."""
        return experts(
            parcels, row_weights=arranged.row_weights, gate_up=self.gate_up, down=self.down, offsets=arranged.offsets,
            plan=arranged.plan, backend=self.backend, fp8=self.fp8,
        )
