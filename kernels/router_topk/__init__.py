"""Routing of tokens to experts: score, biased choice, unbiased renormalised weight and histogram (arXiv:2412.19437)."""

from __future__ import annotations

import dataclasses

import torch

from ..checks import require, require_beside, require_fractions
from ..dispatch import choose_backend
from .native import choose_native, chooses_native
from .reference import SMALLEST_SUM, router_topk_reference

OFFERED = ("triton", "torch", "reference")


@dataclasses.dataclass(frozen=True)
class Choice:
    """choices [N, K] int64, most preferred first, by torch in any order; weights [N, K]; scores [N, E]; counts [E]
    int64 of chosen slots, None by torch, which would wait for the device to count."""

    choices: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    counts: torch.Tensor | None


def router_topk(
    logits: torch.Tensor,
    *,
    bias: torch.Tensor,
    top_k: int,
    uses_sigmoid: bool = True,
    scale: float = 1.0,
    active: torch.Tensor | None = None,
    backend: str = "auto",
) -> Choice:
    """Choose top-k(score + bias) of logits [N, E] fp32 and weigh by score / sum of the chosen scores * scale.

    bias [E] fp32 takes part in the choice alone and gets no gradient; active [E] bool leaves experts out. Gradients
    flow from weights and scores to logits. Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    op = "router_topk"
    require(logits.ndim == 2, op=op, name="logits", tensor=logits, rule="it must be [tokens, experts]")
    require_fractions(logits, op=op, name="logits")
    experts = logits.shape[1]
    require(bias.shape == (experts,), op=op, name="bias", tensor=bias, rule=f"it must be [{experts}], one per expert")
    require_beside(bias, first=logits, op=op, name="bias")
    if not 1 <= top_k <= experts:
        raise ValueError(f"router_topk: top_k is {top_k}; it must be between 1 and the {experts} experts")
    if active is not None:
        holds = active.shape == (experts,) and active.dtype == torch.bool
        require(holds, op=op, name="active", tensor=active, rule=f"it must be [{experts}] of bool")
        require_beside(active, first=logits, op=op, name="active")
    chosen = choose_backend(backend, op=op, offered=OFFERED, device=logits.device, dtype=logits.dtype)
    if chosen == "triton":
        from .kernel import router_topk_triton

        require(logits.dtype == torch.float32, op=op, name="logits", tensor=logits, rule="routing is done in float32")
        weights, scores, choices, counts = router_topk_triton(logits, bias, active, top_k, uses_sigmoid, scale)
        return Choice(choices, weights, scores, counts)
    if chosen == "torch":
        return _by_torch(logits, bias=bias, top_k=top_k, uses_sigmoid=uses_sigmoid, scale=scale, active=active)
    parts = router_topk_reference(
        logits, bias=bias, top_k=top_k, uses_sigmoid=uses_sigmoid, scale=scale, active=active
    )
    return Choice(*parts)


def _by_torch(
    logits: torch.Tensor, *, bias: torch.Tensor, top_k: int, uses_sigmoid: bool, scale: float,
    active: torch.Tensor | None,
) -> Choice:
    logits = logits if active is None else logits.masked_fill(~active, float("-inf"))
    scores = torch.sigmoid(logits) if uses_sigmoid else torch.softmax(logits, dim=-1)
    preference = scores.detach() + bias
    if active is not None:
        preference = preference.masked_fill(~active, float("-inf"))
    return weigh_choices(scores, preference=preference, top_k=top_k, scale=scale)


def weigh_choices(scores: torch.Tensor, *, preference: torch.Tensor, top_k: int, scale: float) -> Choice:
    """Choose the top-k of preference [N, E] and weigh them by scores [N, E], by PyTorch but for the choice of fp32 on
    the CPU, whose C++ takes the lower of equal experts as the reference does."""
    if chooses_native(preference):
        choices = choose_native(preference, top_k=top_k)
    else:
        choices = preference.topk(top_k, dim=-1, sorted=False).indices
    return Choice(choices, weigh(scores, choices=choices, scale=scale), scores, None)


def weigh(scores: torch.Tensor, *, choices: torch.Tensor, scale: float) -> torch.Tensor:
    """Weights [N, K] of choices [N, K]: their scores over the sum of them, times scale."""
    chosen = scores.gather(1, choices)
    weights = chosen / chosen.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    return weights if scale == 1.0 else weights * scale
