"""Bit-wise cross-entropy in plain PyTorch."""

from __future__ import annotations

import torch


def bit_cross_entropy_reference(
    logits: torch.Tensor, *, bits: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """weight * sum_d -log p(bit_d) from log-sigmoids, in at least fp32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    bits = bits.to(wide.dtype)
    log_one = torch.nn.functional.logsigmoid(wide)
    log_zero = torch.nn.functional.logsigmoid(-wide)
    return -(bits * log_one + (1 - bits) * log_zero).sum(-1) * weights
