"""RMSNorm in plain PyTorch: the truth that the other implementations are compared with."""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, *, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dim, in at least fp32, returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)).to(x.dtype)
