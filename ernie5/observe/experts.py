"""What the routers do: entropy, balance, dead experts, spread of the bias, and the group analyses of SPEC section 5.

loads [L, E]: tokens per MoE layer and expert; group_loads [L, 6, E]: the same by TokenKind 1..6. A layer or group
that saw no token gives NaN: it has no distribution, and a mean must leave it out (torch.nanmean).
"""

from __future__ import annotations

import dataclasses
import math

import torch

TOP_SHARE = 0.25  # the report compares the busiest quarter of the experts between groups


@dataclasses.dataclass(frozen=True)
class ExpertSummary:
    """Per layer [L]: normalised entropy in [0, 1], max/mean load (>= 1), number of experts without a token."""

    entropy: torch.Tensor
    max_ratio: torch.Tensor
    dead: torch.Tensor


def summarise_loads(loads: torch.Tensor) -> ExpertSummary:
    """The balance figures of loads [L, E]; no host synchronisation."""
    return ExpertSummary(load_entropy(loads), max_load_ratio(loads), dead_experts(loads))


def load_entropy(loads: torch.Tensor) -> torch.Tensor:
    """Normalised entropy -sum p log p / log E over the last dim: [..., E] -> [...] fp64 (SPEC section 5)."""
    loads = loads.double()
    experts = loads.shape[-1]
    if experts == 1:
        return torch.where(loads.sum(-1) > 0, 1.0, torch.nan)
    shares = loads / loads.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1) / math.log(experts)


def max_load_ratio(loads: torch.Tensor) -> torch.Tensor:
    """Load of the fullest expert over the mean load: [..., E] -> [...] fp64; 1 is perfect balance."""
    loads = loads.double()
    return loads.amax(-1) / loads.mean(-1)


def dead_experts(loads: torch.Tensor) -> torch.Tensor:
    """Number of experts without a single token: [..., E] -> [...] int64."""
    return (loads == 0).sum(-1)


def bias_spread(bias: torch.Tensor) -> torch.Tensor:
    """Largest minus smallest balance bias of each layer: [L, E] -> [L] fp64."""
    return bias.double().amax(-1) - bias.double().amin(-1)


def group_overlap(group_loads: torch.Tensor, *, share: float = TOP_SHARE) -> torch.Tensor:
    """Intersection over union of the busiest `share` of experts between groups: [L, G, E] -> [L, G, G] fp64.

    Chance is share / (2 - share) = 0.143 for a quarter. Ties go to the lower expert index.
    """
    experts = group_loads.shape[-1]
    chosen = max(1, round(share * experts))
    order = torch.sort(group_loads.double(), dim=-1, descending=True, stable=True).indices[..., :chosen]
    top = torch.zeros(group_loads.shape, dtype=torch.float64, device=group_loads.device).scatter_(-1, order, 1.0)
    common = top @ top.transpose(-1, -2)
    overlap = common / (2 * chosen - common)
    seen = group_loads.sum(-1) > 0
    return torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), overlap, torch.nan)
