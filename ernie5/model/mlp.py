"""Dense SwiGLU feed-forward: dense layers, shared experts, MTP blocks, the ViT."""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.linear import Linear
from ernie5_kernels.swiglu import swiglu


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) without bias; gate and up are one matrix [2F, D], gate first."""

    def __init__(self, width: int, *, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = Linear(width, 2 * hidden_width)
        self.down = Linear(hidden_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        return self.down(swiglu(self.gate_up(x)))
