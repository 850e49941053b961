"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from ernie5_kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim of x [..., D], accumulated in at least fp32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D], same dtype."""
        return rms_norm(x, weight=self.weight, eps=self.eps)
