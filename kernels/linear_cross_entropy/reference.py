"""Cross-entropy of a linear head in plain PyTorch, with the whole logits in memory."""

from __future__ import annotations

import torch


def linear_cross_entropy_reference(
    hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], in at least fp32."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def partials_reference(
    hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor, first_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(largest logit, sum of exponentials below it, the target's logit or 0) over the ids that weight holds."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    local = targets - first_id
    inside = (local >= 0) & (local < weight.shape[0])
    picked = logits.gather(1, local.clamp(0, weight.shape[0] - 1).unsqueeze(1)).squeeze(1)
    peak = logits.amax(1)
    return peak, (logits - peak.unsqueeze(1)).exp().sum(1), torch.where(inside, picked, 0.0)
