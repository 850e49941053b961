"""Muon where every rank of an axis keeps a piece of the flattened parameters, as ZeRO does.

A momentum moves element by element, a matrix is orthogonalised as a whole. So the ranks move their pieces of the
momentum, gather them bucket by bucket, orthogonalise an even share of the whole matrices each (`spread`), and step
their pieces of the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ernie5.optim.adamw import AdamW, create_state
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import scale_of
from ernie5.optim.spread import Peers, Spread, buckets, find_directions, gather_rows


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Who holds which elements of a flat part: rank r those from bounds[r] to bounds[r + 1]; this rank has its own from
    element `offset` of its flat piece on."""

    bounds: tuple[int, ...]
    offset: int

    def size(self, rank: int) -> int:
        """How many elements a rank holds."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def own(self, piece: torch.Tensor, *, rank: int) -> torch.Tensor:
        """The elements in this rank's flat piece, a view."""
        return piece[self.offset : self.offset + self.size(rank)]


def cut_as_one(lengths: Sequence[int], *, length: int, rank: int, size: int) -> list[Pieces]:
    """The parts of `lengths`, one after another, cut into equal pieces of `length` (ZeRO's stages 1 and 2)."""
    pieces, first = [], 0
    for numel in lengths:
        bounds = [min(max(place * length - first, 0), numel) for place in range(size)]
        pieces.append(Pieces((*bounds, numel), max(first - rank * length, 0)))
        first += numel
    return pieces


def cut_apart(lengths: Sequence[int], *, size: int, own: Sequence[int]) -> list[Pieces]:
    """Each of the parts of `lengths` cut into equal pieces by itself, own[i] long with what pads the last (stage 3)."""
    pieces, offset = [], 0
    for numel, length in zip(lengths, own, strict=True):
        pieces.append(Pieces(tuple(min(place * length, numel) for place in range(size + 1)), offset))
        offset += length
    return pieces


@dataclasses.dataclass(frozen=True)
class Stack:
    """One parameter of a flat piece: how it is spread, its maps [.., M, N], and who holds which of its elements."""

    spread: Spread
    maps: torch.Size
    pieces: Pieces


class FlatMuon(AdamW):
    """Muon for groups of hidden matrices, AdamW for all others; made of this rank's parts, stepped on pieces of them.

    After it was made, each group's parameters are to be replaced by one flat piece: equal parts of the parameters one
    after another, padded at the end; or by pieces of which `locate` says what they are. spreads: by name, of matrices.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], *, config: OptimConfig, spreads: Mapping[str, Spread]
    ) -> None:
        super().__init__(groups, config=config)
        self._config = config
        self._located: dict[torch.Tensor, list[Stack]] = {}
        self._fused = {n: count for group in groups for n, count in zip(group.names, group.fused, strict=True)}
        self._spreads = {name: spreads[name] for group in groups if group.is_matrix for name in group.names}
        for group, made in zip(self.param_groups, groups, strict=True):
            group["matrices"] = made.names if made.is_matrix else ()

    def locate(self, piece: torch.Tensor, *, names: Sequence[str], lengths: Sequence[int]) -> None:
        """Say that a flat piece, which steps will find in its group, holds equal pieces of `lengths` of each of the
        parameters `names`. Nothing is to be known of pieces that AdamW steps."""
        if all(name in self._spreads for name in names):
            parts = [self._spreads[name].numel for name in names]
            size = self._spreads[names[0]].team.copies.size
            self._located[piece] = self._stacks(names, pieces=cut_apart(parts, size=size, own=lengths))
            self._materialise(piece, is_matrix=True)

    def materialise(self) -> None:
        """Create the state of the pieces: a momentum for matrices, AdamW's for the others."""
        for group in self.param_groups:
            for piece in group["params"]:
                self._materialise(piece, is_matrix=bool(group["matrices"]))

    def _materialise(self, piece: torch.Tensor, *, is_matrix: bool) -> None:
        if not is_matrix:
            create_state(self, parameter=piece)
        elif not self.state[piece]:
            self.state[piece]["momentum"] = torch.zeros_like(piece)

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: torch.Tensor | None = None) -> None:
        """Update the pieces of all groups, times `gradient_scale`; collective over the team of each."""
        self.materialise()
        everything = self.param_groups
        for group in everything:
            for piece in group["params"] if group["matrices"] else ():
                self._step_matrices(piece, group, gradient_scale=gradient_scale)
        self.param_groups = [group for group in everything if not group["matrices"]]
        try:
            super().step(closure, gradient_scale=gradient_scale)
        finally:
            self.param_groups = everything

    def _step_matrices(self, piece: torch.Tensor, group: dict, /, *, gradient_scale: torch.Tensor | None) -> None:
        gradient = piece.grad if gradient_scale is None else piece.grad * gradient_scale
        momentum = self.state[piece]["momentum"].lerp_(gradient, 1.0 - self._config.muon_momentum)
        ahead = gradient.lerp(momentum, self._config.muon_momentum)
        piece.mul_(1.0 - group["lr"] * group["weight_decay"])
        stacks = self._located.get(piece) or self._stacks_in_turn(piece, names=group["matrices"])
        for bucket in buckets([stack.spread for stack in stacks]):
            self._step_bucket(piece, [stacks[index] for index in bucket], ahead=ahead, rate=group["lr"])

    def _step_bucket(
        self, piece: torch.Tensor, stacks: Sequence[Stack], /, *, ahead: torch.Tensor, rate: float
    ) -> None:
        peers = stacks[0].spread.team.copies
        momenta = _gather_pieces(ahead, [stack.pieces for stack in stacks], peers=peers)
        directions = find_directions(
            momenta,
            spreads=[stack.spread for stack in stacks],
            maps=[stack.maps for stack in stacks],
            steps=self._config.muon_steps,
        )
        for stack, direction in zip(stacks, directions, strict=True):
            update = direction[stack.pieces.bounds[peers.rank] : stack.pieces.bounds[peers.rank + 1]]
            own = stack.pieces.own(piece, rank=peers.rank)
            own.add_(update.to(own.device), alpha=-rate * scale_of(stack.maps))

    def _stacks_in_turn(self, piece: torch.Tensor, *, names: Sequence[str]) -> list[Stack]:
        spreads = [self._spreads[name] for name in names]
        peers = spreads[0].team.copies
        lengths = [spread.numel for spread in spreads]
        pieces = cut_as_one(lengths, length=piece.numel(), rank=peers.rank, size=peers.size)
        return self._stacks(names, pieces=pieces)

    def _stacks(self, names: Sequence[str], *, pieces: Sequence[Pieces]) -> list[Stack]:
        return [
            Stack(self._spreads[name], self._spreads[name].maps(self._fused[name]), own)
            for name, own in zip(names, pieces, strict=True)
        ]


def _gather_pieces(piece: torch.Tensor, pieces: Sequence[Pieces], /, *, peers: Peers) -> list[torch.Tensor]:
    """The whole flat parts whose elements lie in the pieces of all `peers`, of which this rank has `piece`."""
    lengths = [[one.size(rank) for one in pieces] for rank in range(peers.size)]
    rows = gather_rows([one.own(piece, rank=peers.rank) for one in pieces], lengths=lengths, peers=peers)
    return list(rows[0]) if len(rows) == 1 else [torch.cat(own) for own in zip(*rows, strict=True)]
