"""Keeping experts evenly loaded: the bias update after each step, the auxiliary losses, the orthogonality step.

Padding never counts. The switch loss is E * sum_e f_e P_e (Fedus et al. 2021, arXiv:2101.03961) with f_e the fraction
of choices and P_e the mean normalised score: 1 where perfectly even. The z-loss is mean(logsumexp(logits)^2)
(arXiv:2202.08906). Both are means over tokens, and the model averages them over layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from ernie5.model.config import BalanceConfig, ModelConfig
from ernie5.model.interfaces import Routing, RoutingPool
from ernie5.model.moe.router import Router
from ernie5.records import RoutingStats, SubNetwork, TokenKind

NUM_KINDS = len(TokenKind)


@dataclasses.dataclass(frozen=True)
class LayerRouting:
    """One layer's part of RoutingStats: group_loads [6, E] fp32, and the losses (0-d, zero where off)."""

    group_loads: torch.Tensor
    switch_loss: torch.Tensor
    sequence_loss: torch.Tensor
    z_loss: torch.Tensor


class OwnTokens:
    """The RoutingPool of a process that holds whole rows."""

    def loads(self, group_loads: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return group_loads

    def whole(self, routing: Routing, *, kinds: torch.Tensor) -> tuple[Routing, torch.Tensor]:
        """As they are."""
        return routing, kinds


OWN_TOKENS = OwnTokens()


def measure_routing(
    routing: Routing, *, kinds: torch.Tensor, config: BalanceConfig, pool: RoutingPool = OWN_TOKENS
) -> LayerRouting:
    """Count loads by kind of token and compute the losses that `config` switches on. kinds [B, T] int64."""
    num_experts = routing.num_experts
    flat_kinds = kinds.flatten()
    with torch.no_grad():
        slots = (flat_kinds.unsqueeze(1) * num_experts + routing.choices).flatten()
        counts = torch.zeros(NUM_KINDS * num_experts, dtype=torch.float32, device=slots.device)
        counts.scatter_add_(0, slots, torch.ones((), device=slots.device).expand(slots.shape))
    loads = pool.loads(counts.view(NUM_KINDS, num_experts)[1:])
    zero = torch.zeros((), dtype=routing.weights.dtype, device=slots.device)
    switch, sequence, z = zero, zero, zero
    if config.needs_scores:
        routing, kinds = pool.whole(routing, kinds=kinds)
        flat_kinds = kinds.flatten()
    valid = flat_kinds != TokenKind.PADDING
    if config.switch_loss:
        switch = _evenness(routing, valid=valid.view(1, -1)).sum()
    if config.sequence_loss:
        filled = valid.view(kinds.shape)
        rows = filled.any(-1).sum().clamp(min=1)
        sequence = _evenness(routing, valid=filled).sum() / rows
    if config.z_loss:
        squared = torch.logsumexp(routing.logits, dim=-1).square()
        z = (squared * valid).sum() / valid.sum().clamp(min=1)
    return LayerRouting(loads, switch, sequence, z)


def stack_routings(
    routings: dict[int, LayerRouting], *, config: ModelConfig, chosen: tuple[int, ...], like: torch.Tensor
) -> RoutingStats:
    """Statistics by layer -> those of a forward pass: layers that did not run have zero loads, and means are over the
    `chosen` ones, here and in other sections of the model."""
    experts = config.moe.num_experts
    absent = torch.zeros(NUM_KINDS - 1, experts, dtype=torch.float32, device=like.device)
    loads = [routings[i].group_loads if i in routings else absent for i in config.moe_layers]
    groups = torch.stack(loads) if loads else absent.new_zeros(0, *absent.shape)
    ran, count = list(routings.values()), len(set(chosen) & set(config.moe_layers))
    zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    means = [
        torch.stack(losses).sum() / count if losses else zero
        for losses in ([r.switch_loss for r in ran], [r.sequence_loss for r in ran], [r.z_loss for r in ran])
    ]
    return RoutingStats(groups.sum(1), groups, *means)


def _evenness(routing: Routing, *, valid: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e per row [B] over the tokens that `valid` [B, T] marks; 0 for a row without any."""
    rows, num_experts = valid.shape[0], routing.num_experts
    tokens = valid.sum(1).clamp(min=1).unsqueeze(1)
    chosen = torch.zeros_like(routing.scores).scatter_(1, routing.choices, 1.0) * valid.reshape(-1, 1)
    fraction = chosen.view(rows, -1, num_experts).sum(1) / (tokens * routing.choices.shape[1])
    share = routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(1e-12)
    mean_share = (share * valid.reshape(-1, 1)).view(rows, -1, num_experts).sum(1) / tokens
    return num_experts * (fraction.detach() * mean_share).sum(-1)


@torch.no_grad()
def update_balance(
    routers: Iterable[Router], *, loads: torch.Tensor, speed: float, subnetwork: SubNetwork | None = None
) -> None:
    """bias_e += speed * sign(mean load - load_e) for every router, after an optimizer step that was not skipped.

    routers: `model.routers()`, in order of MoE layers; loads [L, E] fp32 summed over every rank and micro-batch of the
    step, padding left out. Mean and update cover the experts of `subnetwork` alone, and layers that did not run have
    zero loads everywhere and are left as they are.
    """
    if speed == 0.0:
        return
    active = None if subnetwork is None else subnetwork.experts
    for router, load in zip(routers, loads, strict=True):
        index = torch.arange(load.numel()) if active is None else torch.tensor(active)
        index = index.to(router.balance_bias.device)
        used = load.to(router.balance_bias.device).index_select(0, index)
        router.balance_bias.index_add_(0, index, speed * torch.sign(used.mean() - used))


@torch.no_grad()
def orthogonality_step(router: Router, *, speed: float) -> None:
    """One gradient step on ||W^ W^T - I||^2_F / E^2, W^ the rows of the router weight at unit length (ERNIE 4.5).

    Applied after the optimizer step and apart from it. With G = W^ W^T - I the gradient by W^ is 4 G W^ / E^2; each
    row's is projected off the row and divided by its length.
    """
    wide = router.weight.to(torch.promote_types(router.weight.dtype, torch.float32))
    length = wide.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    unit = wide / length
    gram = unit @ unit.T - torch.eye(unit.shape[0], dtype=unit.dtype, device=unit.device)
    by_unit = 4.0 * gram @ unit / unit.shape[0] ** 2
    gradient = (by_unit - unit * (by_unit * unit).sum(-1, keepdim=True)) / length
    router.weight.sub_((speed * gradient).to(router.weight.dtype))


def orthogonality_loss(router: Router) -> torch.Tensor:
    """||W^ W^T - I||^2_F / E^2 of a router, at least fp32."""
    wide = router.weight.to(torch.promote_types(router.weight.dtype, torch.float32))
    unit = torch.nn.functional.normalize(wide, dim=-1, eps=1e-12)
    identity = torch.eye(unit.shape[0], dtype=unit.dtype, device=unit.device)
    return (unit @ unit.T - identity).square().sum() / unit.shape[0] ** 2
