"""All experts of a layer in plain PyTorch: two grouped products around SwiGLU, group by group."""

from __future__ import annotations

import torch

from ..grouped_gemm.reference import grouped_gemm_reference
from ..swiglu.reference import swiglu_reference


def experts_reference(
    rows: torch.Tensor,
    *,
    row_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """out[r] = row_weights[r] * down[g] (silu(gate) * up) with gate, up = gate_up[g] rows[r]."""
    middle = grouped_gemm_reference(rows, weight=gate_up, offsets=offsets)
    return grouped_gemm_reference(swiglu_reference(middle, row_weights=row_weights), weight=down, offsets=offsets)
