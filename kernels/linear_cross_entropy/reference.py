"""Cross-entropy of a linear head in plain PyTorch, with the whole logits in memory."""

from __future__ import annotations

import torch


def linear_cross_entropy_reference(
    hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], in at least fp32."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
