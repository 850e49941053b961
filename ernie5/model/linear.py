"""A linear map without bias, by the kernel of the device."""

from __future__ import annotations

import torch
from torch import nn

from ernie5_kernels.linear import linear


class Linear(nn.Linear):
    """y = x W^T; torch's module, weight [out, in], with another arithmetic."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, weight=self.weight)
