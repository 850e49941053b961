"""The way of a token to the rank that holds its expert: straight, or over one rank of that rank's node."""

from __future__ import annotations

import torch

from ernie5.parallel.state import Axis


class RouteTable:
    """One leg: the rank of the ep axis to which choices of the experts of each rank go."""

    def __init__(self, next_rank: tuple[int, ...]) -> None:
        self.next_rank = next_rank
        self._made: dict[tuple[int, torch.device], torch.Tensor] = {}

    def destinations(self, num_experts: int, *, device: torch.device) -> torch.Tensor:
        """[E] int64, kept on the device."""
        key = (num_experts, device)
        if key not in self._made:
            held = num_experts // len(self.next_rank)
            self._made[key] = torch.tensor(self.next_rank, device=device).repeat_interleave(held)
        return self._made[key]


def routes_of(axis: Axis, *, crosses_once: bool) -> tuple[RouteTable, ...]:
    """One leg, straight to the holder; with `crosses_once` first to a rank of the holder's node, where nodes hold
    several ranks of the axis and the axis has several nodes.

    Across nodes, the i-th rank of a node meets the i-th rank of every other node (modulo its size where nodes are
    uneven), so that all ranks share the work at the border.
    """
    straight = RouteTable(tuple(range(axis.size)))
    if not crosses_once or len(set(axis.nodes)) in (1, axis.size):
        return (straight,)
    members: dict[int, list[int]] = {}
    for coordinate, node in enumerate(axis.nodes):
        members.setdefault(node, []).append(coordinate)
    own = members[axis.nodes[axis.coordinate]]
    place = own.index(axis.coordinate)
    gates = {node: ranks[place % len(ranks)] for node, ranks in members.items()}
    return RouteTable(tuple(gates[node] for node in axis.nodes)), straight
