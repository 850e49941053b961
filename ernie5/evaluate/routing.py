"""Routing analyses of SPEC section 5, from token counts per layer, group and expert."""

from __future__ import annotations

import math

import torch

from ernie5.evaluate.figures import RoutingFigures
from ernie5.records import TokenKind

GROUPS = tuple(TokenKind(index) for index in range(1, 7))
BUSY_PART = 0.25


def normalised_entropy(loads: torch.Tensor) -> torch.Tensor:
    """NE = -sum p log p / log E over the last axis of loads [.., E]; 1 is even, 0 one expert, NaN no token."""
    share = loads.double() / loads.double().sum(dim=-1, keepdim=True)
    nats = -(share * share.clamp(min=1e-300).log()).sum(dim=-1)
    return nats / math.log(max(loads.shape[-1], 2))


def busy_overlap(loads: torch.Tensor) -> torch.Tensor:
    """IoU of the busiest quarter of experts between groups: loads [G, E] -> [G, G]; chance is 0.143."""
    num_busy = max(1, round(loads.shape[-1] * BUSY_PART))
    busy = torch.zeros_like(loads).scatter(-1, loads.topk(num_busy, dim=-1).indices, 1.0)
    shared = busy @ busy.T
    return shared / (2 * num_busy - shared)


def describe_routing(group_loads: torch.Tensor) -> RoutingFigures:
    """Figures from group_loads [L, 6, E], tokens by layer, TokenKind 1..6, expert; absent groups drop out."""
    loads = group_loads.double().cpu()
    present = [index for index in range(len(GROUPS)) if loads[:, index].sum() > 0]
    total = loads.sum(dim=1)
    mean = total.mean(dim=-1, keepdim=True).clamp(min=1e-12)
    ratio = total / mean
    chosen = loads[:, present]
    group_ratio = chosen / chosen.mean(dim=-1, keepdim=True).clamp(min=1e-12)
    num_layers = loads.shape[0]
    shown = tuple(sorted({0, num_layers // 2, num_layers - 1}))
    return RoutingFigures(
        groups=tuple(GROUPS[index].name.lower().replace("_", " ") for index in present),
        loads=_rows(ratio),
        group_loads=tuple(_rows(group_ratio[:, place]) for place in range(len(present))),
        entropy=_rows(normalised_entropy(chosen).T),
        overlap=tuple(_rows(busy_overlap(chosen[layer])) for layer in shown),
        overlap_layers=shown,
        max_load_ratio=tuple(ratio.amax(dim=-1).tolist()),
        dead_experts=int((total == 0).sum()),
    )


def _rows(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
