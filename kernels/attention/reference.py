"""Attention under row intervals with the whole mask and the whole score matrix in memory."""

from __future__ import annotations

import torch


def dense_mask(intervals: torch.Tensor, *, query_start: int, query_tokens: int) -> torch.Tensor:
    """Visibility [B, T, S] (bool) of rows query_start.. for key columns with intervals [B, S, 4]."""
    rows = torch.arange(query_start, query_start + query_tokens, device=intervals.device).view(1, -1, 1)
    visible_from, hidden_from, hidden_until, visible_until = intervals.unsqueeze(1).unbind(-1)
    hidden = (hidden_from <= rows) & (rows < hidden_until)
    return (visible_from <= rows) & (rows < visible_until) & ~hidden


def attention_reference(
    query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention of query [B, T, H, C] over key and value [B, S, G, C] where mask [B, T, S] is true."""
    groups = query.shape[2] // key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = key.repeat_interleave(groups, dim=2).to(wide)
    values = value.repeat_interleave(groups, dim=2).to(wide)
    scores = torch.einsum("bthc,bshc->bhts", query.to(wide), keys) * scale
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    seen = mask.any(-1)[:, None, :, None]
    weights = torch.where(seen, torch.softmax(scores.masked_fill(~seen, 0.0), dim=-1), 0.0)
    return torch.einsum("bhts,bshc->bthc", weights, values).to(query.dtype)
