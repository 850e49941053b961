"""Rows of tokens to experts and back in plain PyTorch."""

from __future__ import annotations

import torch


def gather_rows_reference(x: torch.Tensor, *, sources: torch.Tensor) -> torch.Tensor:
    """rows[r] = x[sources[r]]."""
    return x[sources]


def sum_places_reference(rows: torch.Tensor, *, places: torch.Tensor) -> torch.Tensor:
    """out[n] = sum over k of rows[places[n, k]], in at least fp32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide)[places].sum(1).to(rows.dtype)
