"""Sum of squares tensor by tensor, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def sum_squares_reference(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """0-d fp64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()
