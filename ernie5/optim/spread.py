"""How ranks hold hidden matrices, and how a matrix becomes whole for Muon: it orthogonalises no part by itself.

Ranks that hold parts of one matrix (tensor parallelism) and ranks that hold copies or pieces of one part (data
parallelism) are a *team*: parts are gathered, each rank iterates an even share of the whole matrices, all gather the
results and keep their parts. This folder knows no process groups: to gather is a callable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from ernie5.optim.newton_schulz import orthogonalise_all

BUCKET_ELEMENTS = 50_000_000
"""Elements of whole matrices that are gathered at a time: 200 MB of fp32 momenta, 100 MB of bf16 results."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """Ranks along one axis, of which this is one. gather: flat parts and their sizes in order of ranks -> whole."""

    rank: int
    size: int
    gather: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


ALONE = Peers(rank=0, size=1, gather=lambda part, sizes: part)


@dataclasses.dataclass(frozen=True)
class Team:
    """The ranks that hold the same matrices. parts: those that together hold one of them; copies: those that hold
    copies (or an optimizer's pieces) of this rank's part. Ranks are counted with `parts` varying fastest."""

    parts: Peers = ALONE
    copies: Peers = ALONE

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.parts.size * self.copies.size

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return self.copies.rank * self.parts.size + self.parts.rank

    def gather(self, own: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """Flat tensors of all ranks, sizes[r] long on rank r, one after another; collective."""
        rows = [sizes[first : first + self.parts.size] for first in range(0, self.size, self.parts.size)]
        row = self.parts.gather(own, rows[self.copies.rank])
        return self.copies.gather(row, [sum(row_sizes) for row_sizes in rows])


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a team holds a parameter of `shape` (of experts, those of this team alone).

    spans: where ranks of `team.parts` hold other parts, (first, size) for each of them: these indices of dim `dim` in
    each of its `fused` equal parts. Several ranks may hold the same. Without spans each of them holds all of it.
    """

    shape: torch.Size
    team: Team = Team()
    dim: int = 0
    fused: int = 1
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def numel(self) -> int:
        """Elements of this rank's part."""
        return self.part_shape(self.team.parts.rank).numel()

    def part_shape(self, rank: int) -> torch.Size:
        """[.., fused, size, ..] of the part of a rank, the cut dim as two; `shape` where nothing is cut."""
        if not self.spans:
            return self.shape
        return torch.Size((*self.shape[: self.dim], self.fused, self.spans[rank][1], *self.shape[self.dim + 1 :]))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole, of `shape`, out of the flat parts of all ranks of `team.parts`."""
        whole = parts[0].new_empty(self.shape)
        for rank, part in enumerate(parts):
            self._window(whole, rank=rank).copy_(part.view(self.part_shape(rank)))
        return whole

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole, flat."""
        return self._window(whole.view(self.shape), rank=self.team.parts.rank).flatten()

    def _window(self, whole: torch.Tensor, *, rank: int) -> torch.Tensor:
        if not self.spans:
            return whole
        return whole.unflatten(self.dim, (self.fused, -1)).narrow(self.dim + 1, *self.spans[rank])

    def maps(self, fused: int) -> torch.Size:
        """[.., M, N] of the maps in the whole.

        Gate and up are two, [.., 2F, D] -> [.., 2, F, D]; a kernel [out, in, h, w] is one, from all that it sees to its
        output: [1, out, in*h*w].
        """
        if len(self.shape) == 4:
            return torch.Size((1, self.shape[0], self.shape[1:].numel()))
        return torch.Size((*self.shape[:-2], fused, self.shape[-2] // fused, self.shape[-1]))


def buckets(spreads: Sequence[Spread]) -> Iterator[list[int]]:
    """Indices of at most BUCKET_ELEMENTS together, or one of more: one team's after another's, in the same order on all
    ranks of a team."""
    by_team: dict[Team, list[list[int]]] = {}
    for index, spread in enumerate(spreads):
        made = by_team.setdefault(spread.team, [[]])
        if made[-1] and sum(spreads[k].shape.numel() for k in (*made[-1], index)) > BUCKET_ELEMENTS:
            made.append([])
        made[-1].append(index)
    for made in by_team.values():
        yield from made


def find_directions(
    momenta: Sequence[torch.Tensor], *, spreads: Sequence[Spread], maps: Sequence[torch.Size], steps: int
) -> list[torch.Tensor]:
    """Own parts, flat, of the orthogonalised whole matrices [.., M, N] = maps[i] whose momenta this rank's flat
    `momenta` are parts of; in the type of the iterations. All of one team, collective over it."""
    team = spreads[0].team
    wholes = _gather_parts(momenta, spreads=spreads)
    cuts = share_matrices(maps, num_ranks=team.size)
    mine = [
        whole.view(-1, *shape[-2:])[cut[team.rank] : cut[team.rank + 1]]
        for whole, shape, cut in zip(wholes, maps, cuts, strict=True)
    ]
    sizes = [
        sum((cut[rank + 1] - cut[rank]) * shape[-2:].numel() for cut, shape in zip(cuts, maps, strict=True))
        for rank in range(team.size)
    ]
    own = torch.cat([direction.flatten() for direction in orthogonalise_all(mine, steps=steps)])
    found = team.gather(own, sizes).split([shape.numel() for shape in maps])
    return [spread.own(direction) for spread, direction in zip(spreads, found, strict=True)]


def _gather_parts(parts: Sequence[torch.Tensor], *, spreads: Sequence[Spread]) -> list[torch.Tensor]:
    """The whole tensors of which this rank has the flat `parts`; those that nothing cuts are whole already."""
    peers = spreads[0].team.parts
    cut = [index for index, spread in enumerate(spreads) if spread.spans]
    wholes = list(parts)
    if not cut:
        return wholes
    lengths = [[spreads[index].part_shape(rank).numel() for index in cut] for rank in range(peers.size)]
    rows = gather_rows([parts[index] for index in cut], lengths=lengths, peers=peers)
    for place, index in enumerate(cut):
        wholes[index] = spreads[index].join([row[place] for row in rows])
    return wholes


def gather_rows(
    own: Sequence[torch.Tensor], *, lengths: Sequence[Sequence[int]], peers: Peers
) -> list[Sequence[torch.Tensor]]:
    """The flat tensors of every rank of `peers`, rows[rank][i] lengths[rank][i] long, of which this rank has `own`;
    collective, one gathering for all."""
    everything = peers.gather(torch.cat(list(own)), [sum(sizes) for sizes in lengths])
    parted = everything.split([sum(sizes) for sizes in lengths])
    return [row.split(list(sizes)) for row, sizes in zip(parted, lengths, strict=True)]


def share_matrices(shapes: Sequence[torch.Size], *, num_ranks: int) -> list[list[int]]:
    """Which matrices of stacks `shapes` [.., M, N] each rank iterates: rank r those from cuts[stack][r] to [r + 1].

    Parts cost about as much, and follow each other: part after part in order of ranks is stack after stack.
    """
    costs = [shape[-2:].numel() * min(shape[-2:]) for shape in shapes]
    counts = [shape[:-2].numel() for shape in shapes]
    total = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    cuts, before = [], 0
    for cost, count in zip(costs, counts, strict=True):
        bounds = [-(-(total * rank - before * num_ranks) // (cost * num_ranks)) for rank in range(num_ranks + 1)]
        cuts.append([min(max(bound, 0), count) for bound in bounds])
        before += cost * count
    return cuts
