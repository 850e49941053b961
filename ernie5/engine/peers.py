"""Who holds Muon's matrices together, and how: the teams of the optimizer out of the layout's axes and cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ernie5.optim.groups import ParameterGroup
from ernie5.optim.spread import Peers, Spread, Team
from ernie5.parallel.apply import Layout
from ernie5.parallel.collectives import all_gather, even_sizes
from ernie5.parallel.state import Axis


def find_spreads(layout: Layout, *, device: torch.device) -> dict[str, Spread]:
    """How the ranks of this pipeline stage hold each of its parameters, by name; matrices are iterated on `device`.

    Parts of an expert are on etp ranks and their copies (or ZeRO's pieces) on edp ranks, those of all else on tp and
    dp x cp. What ep cuts off are other experts, and so other matrices.
    """
    state = layout.state
    plain = Team(peers_along(state.tp, device=device), peers_along(state.dp_cp, device=device))
    routed = Team(peers_along(state.etp, device=device), peers_along(state.edp, device=device))
    experts = set(layout.experts)
    return {
        name: _spread(layout, name=name, team=routed if name in experts else plain)
        for name in layout.shards
        if layout.is_here(name)
    }


def cut_groups(
    groups: Sequence[ParameterGroup], *, spreads: Mapping[str, Spread], most_elements: int
) -> list[ParameterGroup]:
    """Muon's groups cut into such as no rank of a team has more than `most_elements` of in its pieces, all at the same
    parameters; one of more is a group by itself.

    ZeRO's stage 3 steps that many at a time, and counts each rank's own: where tp cuts unevenly, ranks of one team
    would step other matrices together.
    """
    result: list[ParameterGroup] = []
    for group in groups:
        if not group.is_matrix:
            result.append(group)
            continue
        counts = [_most_elements(spreads[name]) for name in group.names]
        first, taken = 0, 0
        for place, count in enumerate(counts):
            if place > first and taken + count > most_elements:
                result.append(_between(group, first=first, end=place))
                first, taken = place, 0
            taken += count
        result.append(_between(group, first=first, end=len(counts)))
    return result


def _most_elements(spread: Spread) -> int:
    """Elements of the largest piece that a rank of the team holds."""
    parts = range(spread.team.parts.size)
    return -(-max(spread.part_shape(rank).numel() for rank in parts) // spread.team.copies.size)


def _between(group: ParameterGroup, *, first: int, end: int) -> ParameterGroup:
    return dataclasses.replace(group, names=group.names[first:end], parameters=group.parameters[first:end])


def _spread(layout: Layout, *, name: str, team: Team) -> Spread:
    shard, state = layout.shards[name], layout.state
    shape = list(shard.shape)
    for cut in shard.cuts:
        if cut.axis == "ep":
            shape[cut.dim] //= state.ep.size
    inner = [cut for cut in shard.cuts if cut.axis != "ep"]
    if not inner:
        return Spread(torch.Size(shape), team)
    (cut,) = inner
    sizes = even_sizes(shape[cut.dim] // cut.fused, axis=state.axis(cut.axis))
    spans = [(sum(sizes[:place]), size) for place, size in enumerate(sizes)]
    # several tensor-parallel ranks in a row hold one key head where heads are few
    copies = team.parts.size // len(spans)
    spread_out = tuple(span for span in spans for _ in range(copies))
    return Spread(torch.Size(shape), team, cut.dim, cut.fused, spread_out)


def peers_along(axis: Axis, *, device: torch.device) -> Peers:
    """The ranks of `axis`; what they gather, also from host memory, is on `device`."""

    def gather(part: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return all_gather(part.to(device), axis=axis, sizes=sizes)

    return Peers(rank=axis.coordinate, size=axis.size, gather=gather)
