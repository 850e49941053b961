"""Rows of tokens to experts and back in plain PyTorch."""

from __future__ import annotations

import torch


def gather_rows_reference(x: torch.Tensor, *, sources: torch.Tensor) -> torch.Tensor:
    """rows[r] = x[sources[r]]."""
    return x[sources]


def sum_places_reference(
    rows: torch.Tensor, *, places: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """out[n] = sum over k of rows[places[n, k]], or over the places from starts[n] to starts[n + 1]; at least fp32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if starts is not None:
        tokens = torch.arange(starts.shape[0] - 1, device=rows.device).repeat_interleave(starts.diff())
        out = torch.zeros(starts.shape[0] - 1, rows.shape[1], dtype=wide, device=rows.device)
        return out.index_add(0, tokens, rows.to(wide)[places[starts[0] : starts[-1]]]).to(rows.dtype)
    return rows.to(wide)[places].sum(1).to(rows.dtype)
