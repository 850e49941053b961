"""The router: at least fp32 throughout, blind to modality, selecting by biased and weighing by unbiased scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ernie5.model.config import MoEConfig
from ernie5.model.interfaces import Routing
from ernie5_kernels.linear import linear

SMALLEST_SUM = 1e-12


class Router(nn.Module):
    """score = sigmoid or softmax of W x; choices = top-k(score + balance_bias); weights = score, renormalised.

    The bias is a buffer: it takes part in the choice alone, never in a weight and never in a gradient (DeepSeek-V3,
    arXiv:2412.19437). It stays fp32 when the module is cast, because its steps (1e-4) would vanish in bf16.
    """

    def __init__(self, config: MoEConfig, *, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.register_buffer("balance_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.uses_sigmoid, self.scale = config.score == "sigmoid", config.scale

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        exact = self.balance_bias
        super()._apply(fn, recurse)
        moved = self.balance_bias
        self.balance_bias = moved.float() if exact.is_meta or moved.is_meta else exact.to(moved.device)
        return self

    def forward(self, hidden: torch.Tensor, *, top_k: int, active: torch.Tensor | None) -> Routing:
        """Route hidden [N, D] to `top_k` of the experts that `active` [E] bool marks (None: of all)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = linear(hidden.to(wide), weight=self.weight.to(wide))
        if active is not None:
            logits = logits.masked_fill(~active, float("-inf"))
        scores = torch.sigmoid(logits) if self.uses_sigmoid else torch.softmax(logits, dim=-1)
        preference = scores.detach() + self.balance_bias
        if active is not None:
            preference = preference.masked_fill(~active, float("-inf"))
        choices = preference.topk(top_k, dim=-1, sorted=False).indices
        chosen = scores.gather(1, choices)
        weights = chosen / chosen.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
        if self.scale != 1.0:
            weights = weights * self.scale
        return Routing(choices=choices, weights=weights, scores=scores, logits=logits)
