"""SwiGLU in plain PyTorch: the truth that the other implementations are compared with."""

from __future__ import annotations

import torch


def swiglu_reference(gate_up: torch.Tensor, *, row_weights: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) * up * row_weight with gate the first half of the last dim and up the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = gate * torch.sigmoid(gate) * up
    return out if row_weights is None else out * row_weights.to(out.dtype).unsqueeze(-1)
