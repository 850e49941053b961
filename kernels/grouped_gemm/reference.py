"""Grouped matrix product in plain PyTorch: one product per group, concatenated."""

from __future__ import annotations

import torch


def grouped_gemm_reference(rows: torch.Tensor, *, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """y[r] = weight[g(r)] @ rows[r] for rows sorted by group; rows past the last offset give zero."""
    ends = offsets.tolist()
    pieces = [rows[start:end] @ weight[g].T for g, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    pieces.append(rows[ends[-1] :] @ torch.zeros_like(weight[0]).T)
    return torch.cat(pieces)
