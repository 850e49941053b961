"""Interleaved rotation in plain PyTorch, pair by pair."""

from __future__ import annotations

import torch


def rope3d_reference(x: torch.Tensor, *, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_2i, x_2i+1) of x [B, T, H, C] by angles [B, T, C/2]."""
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
