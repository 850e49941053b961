"""A grouped product and its activation in plain PyTorch, one after the other."""

from __future__ import annotations

import torch

from ..grouped_gemm.reference import grouped_gemm_reference
from ..swiglu.reference import swiglu_reference


def grouped_swiglu_reference(
    rows: torch.Tensor, *, gate_up: torch.Tensor, row_weights: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """row_weights[r] * silu(gate) * up with gate, up = gate_up[g] rows[r]."""
    first = grouped_gemm_reference(rows, weight=gate_up, offsets=offsets)
    return swiglu_reference(first, row_weights=row_weights)
