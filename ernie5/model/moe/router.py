"""The router: at least fp32 throughout, blind to modality, selecting by biased and weighing by unbiased scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from ernie5.errors import ConfigError, KernelError
from ernie5.model.config import MoEConfig
from ernie5.model.interfaces import Routing
from ernie5.records import SubNetwork
from ernie5_kernels.linear import linear
from ernie5_kernels.route import route
from ernie5_kernels.router_topk import weigh_choices


class Router(nn.Module):
    """score = sigmoid or softmax of W x; choices = top-k(score + balance_bias), among all experts or among those of the
    best `top_groups` groups; weights = score, renormalised.

    The bias is a buffer: it takes part in the choice alone, never in a weight and never in a gradient (DeepSeek-V3,
    arXiv:2412.19437). It stays fp32 when the module is cast, because its steps (1e-4) would vanish in bf16.
    """

    def __init__(self, config: MoEConfig, *, width: int, backend: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.register_buffer("balance_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.uses_sigmoid, self.scale = config.score == "sigmoid", config.scale
        self.num_groups, self.top_groups = config.num_groups, config.top_groups
        self.backend, self.keeps_scores = backend, config.balance.needs_scores
        if backend == "triton" and config.is_group_limited:
            raise KernelError(
                "model.expert_backend = triton routes among all experts, not among those of model.moe.top_groups = "
                f"{config.top_groups} of {config.num_groups}. Use expert_backend: auto (PyTorch routes) or num_groups 1"
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        exact = self.balance_bias
        super()._apply(fn, recurse)
        moved = self.balance_bias
        self.balance_bias = moved.float() if exact.is_meta or moved.is_meta else exact.to(moved.device)
        return self

    def forward(
        self, hidden: torch.Tensor, *, top_k: int, active: torch.Tensor | None, choices: torch.Tensor | None = None
    ) -> Routing:
        """Route hidden [N, D] to `top_k` of the `active` [E] experts (None: all), or to `choices` [N, K] as given."""
        if self.top_groups < self.num_groups and choices is None:
            return self._route_in_groups(hidden, top_k=top_k, active=active)
        found = route(
            hidden, weight=self.weight, bias=self.balance_bias, top_k=top_k, uses_sigmoid=self.uses_sigmoid,
            scale=self.scale, active=active, choices=choices, keeps_scores=self.keeps_scores, backend=self.backend,
        )
        return Routing(found.choices, found.weights, self.weight.shape[0], found.scores, found.logits)

    def scores(self, hidden: torch.Tensor, *, active: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and logits of all experts [N, E]; those that are not active have logit -inf."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = linear(hidden.to(wide), weight=self.weight.to(wide))
        if active is not None:
            logits = logits.masked_fill(~active, float("-inf"))
        return torch.sigmoid(logits) if self.uses_sigmoid else torch.softmax(logits, dim=-1), logits

    def _route_in_groups(self, hidden: torch.Tensor, *, top_k: int, active: torch.Tensor | None) -> Routing:
        scores, logits = self.scores(hidden, active=active)
        free = torch.where(logits.isneginf(), logits, scores.detach() + self.balance_bias)
        preference = limit_groups(free, num_groups=self.num_groups, top_groups=self.top_groups, top_k=top_k)
        choice = weigh_choices(scores, preference=preference, top_k=top_k, scale=self.scale)
        return Routing(choice.choices, choice.weights, self.weight.shape[0], scores, logits)


def check_subnetwork(subnetwork: SubNetwork, *, config: MoEConfig) -> None:
    """Raise ConfigError where a sub-network leaves a token fewer groups to choose from than it must choose."""
    if not config.is_group_limited or (subnetwork.experts is None and subnetwork.top_k is None):
        return
    size = config.num_experts // config.num_groups
    counted = -(-(subnetwork.top_k or config.top_k) // config.top_groups)
    active = Counter(expert // size for expert in subnetwork.experts or range(config.num_experts))
    usable = sum(number >= counted for number in active.values())
    if usable < config.top_groups:
        raise ConfigError(
            f"a sub-network has {usable} groups of at least {counted} active experts, and model.moe.top_groups = "
            f"{config.top_groups} of {config.num_groups} are chosen per token. Keep experts in more groups, or train "
            "sub-networks with model.moe.num_groups: 1"
        )


def limit_groups(preference: torch.Tensor, *, num_groups: int, top_groups: int, top_k: int) -> torch.Tensor:
    """preference [N, E] with -inf outside each token's best `top_groups` groups of consecutive experts.

    Node-limited routing (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): a group's score is the sum of its highest
    K / M preferences (rounded up where M does not divide K), bias included; one with fewer experts is not chosen.
    """
    groups = preference.unflatten(1, (num_groups, -1))
    counted = -(-top_k // top_groups)
    group_score = groups.topk(counted, dim=-1).values.sum(-1)
    kept = torch.zeros_like(group_score, dtype=torch.bool)
    kept.scatter_(1, group_score.topk(top_groups, dim=-1, sorted=False).indices, True)
    return groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
