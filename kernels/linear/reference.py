"""A linear map in plain PyTorch."""

from __future__ import annotations

import torch


def linear_reference(x: torch.Tensor, *, weight: torch.Tensor) -> torch.Tensor:
    """x [..., K] times weight [N, K] transposed."""
    return x @ weight.T
