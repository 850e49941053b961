"""Routing in plain PyTorch."""

from __future__ import annotations

import torch

SMALLEST_SUM = 1e-12


def router_topk_reference(
    logits: torch.Tensor,
    *,
    bias: torch.Tensor,
    top_k: int,
    uses_sigmoid: bool,
    scale: float,
    active: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(choices, weights, scores, counts); see the public function. Equal preferences go to the lower expert."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if active is not None:
        wide = wide.masked_fill(~active, float("-inf"))
    scores = torch.sigmoid(wide) if uses_sigmoid else torch.softmax(wide, dim=-1)
    preference = scores.detach() + bias
    if active is not None:
        preference = preference.masked_fill(~active, float("-inf"))
    choices = preference.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    chosen = scores.gather(1, choices)
    weights = chosen / chosen.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM) * scale
    counts = torch.bincount(choices.flatten(), minlength=logits.shape[1])
    return choices, weights, scores, counts
