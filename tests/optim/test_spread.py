"""Muon on cut matrices, copies and flat pieces over several ranks, here threads, moves every bit as on whole ones."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from ernie5.optim import spread as spread_module
from ernie5.optim.config import OptimConfig
from ernie5.optim.flat_muon import FlatMuon, cut_apart, cut_as_one
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import Muon
from ernie5.optim.newton_schulz import orthogonalise
from ernie5.optim.spread import ALONE, Peers, Spread, Team, buckets

# name -> whole shape, the dim that ranks cut, equal parts of it; 7 and 5 rows divide by no number of ranks
MATRICES = {
    "a.gate_up.weight": ((14, 5), 0, 2),
    "a.down.weight": ((6, 7), 1, 1),
    "experts.gate_up": ((3, 10, 4), 1, 2),
    "experts.down": ((3, 4, 5), 2, 1),
    "copied.weight": ((3, 5), None, 1),
    "key.weight": ((8, 3), 0, 1),
    "thin.weight": ((2, 9), 0, 1),
}
VECTOR = "norm.weight"
CONFIG = OptimConfig(name="muon", learning_rate=0.1, weight_decay=0.1)
STEPS = 3


class Meeting:
    """Gathers parts of threads."""

    def __init__(self, size: int) -> None:
        self._barrier, self._parts = threading.Barrier(size, timeout=20), [torch.empty(0)] * size

    def peers(self, rank: int) -> Peers:
        def gather(part: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
            assert part.numel() == sizes[rank] and len(sizes) == len(self._parts)
            self._parts[rank] = part
            self._barrier.wait()
            whole = torch.cat(self._parts)
            self._barrier.wait()
            return whole

        return Peers(rank=rank, size=len(self._parts), gather=gather)


def spans_of(name: str, *, ranks: int) -> tuple[tuple[int, int], ...]:
    """Even cuts, the longer ones first; of the four key heads two ranks in a row hold the same where there are more."""
    shape, dim, fused = MATRICES[name]
    copies = 2 if name == "key.weight" and ranks % 2 == 0 else 1
    rows, parts = shape[dim] // fused, ranks // copies
    sizes = [rows // parts + (place < rows % parts) for place in range(parts)]
    return tuple((sum(sizes[:place]), size) for place, size in enumerate(sizes) for _ in range(copies))


def spread_of(name: str, *, team: Team) -> Spread:
    shape, dim, fused = MATRICES[name]
    if dim is None or team.parts.size == 1:
        return Spread(torch.Size(shape), team)
    return Spread(torch.Size(shape), team, dim, fused, spans_of(name, ranks=team.parts.size))


def part_of(whole: torch.Tensor, name: str, /, *, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part, by indices and not by the code under test."""
    _, dim, fused = MATRICES.get(name, (None, None, 1))
    if dim is None or ranks == 1:
        return whole.clone()
    first, size = spans_of(name, ranks=ranks)[rank]
    rows = whole.shape[dim] // fused
    indices = [part * rows + first + row for part in range(fused) for row in range(size)]
    return whole.index_select(dim, torch.tensor(indices, dtype=torch.long))


def groups_of(values: dict[str, torch.Tensor]) -> list[ParameterGroup]:
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    matrices = tuple(name for name in values if name != VECTOR)
    return [
        ParameterGroup("matrix", matrices, tuple(parameters[name] for name in matrices), 0.1, is_matrix=True),
        ParameterGroup("plain", (VECTOR,), (parameters[VECTOR],), 0.0, is_matrix=False),
    ]


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {**{name: shape for name, (shape, _, _) in MATRICES.items()}, VECTOR: (9,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Rank:
    """A rank's optimizer and what it steps: whole parts, or flat pieces of them as ZeRO makes them."""

    def __init__(self, kind: str, parts: dict[str, torch.Tensor], /, *, team: Team) -> None:
        self.kind, self.team = kind, team
        spreads = {name: spread_of(name, team=team) for name in MATRICES}
        groups = groups_of(parts)
        if kind == "whole":
            self.optimizer: torch.optim.Optimizer = Muon(groups, config=CONFIG, spreads=spreads)
            self.pieces = [parameter for group in groups for parameter in group.parameters]
            return
        self.optimizer = FlatMuon(groups, config=CONFIG, spreads=spreads)
        self.pieces = [torch.nn.Parameter(piece) for piece in self.flatten(parts)]
        for group, made, piece in zip(self.optimizer.param_groups, groups, self.pieces, strict=True):
            group["params"] = [piece]
            if kind == "apart":
                lengths = [-(-parameter.numel() // team.copies.size) for parameter in made.parameters]
                self.optimizer.locate(piece, names=made.names, lengths=lengths)

    def flatten(self, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What this rank holds of its parts' values, in the order of `pieces`; padding is NaN, nobody may read it."""
        rank, ranks = self.team.copies.rank, self.team.copies.size
        if self.kind == "whole":
            return list(values.values())
        cut = [[values[name].flatten() for name in names] for names in (MATRICES, (VECTOR,))]
        if self.kind == "as_one":
            cut = [[torch.cat(group)] for group in cut]
        return [torch.cat([_padded(part, ranks=ranks).chunk(ranks)[rank] for part in group]) for group in cut]

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        for piece, gradient in zip(self.pieces, self.flatten(gradients), strict=True):
            piece.grad = gradient.clone()
        self.optimizer.step(gradient_scale=torch.tensor(0.5))

    def momenta(self) -> list[torch.Tensor]:
        return [self.optimizer.state[piece].get("momentum", piece.detach()) for piece in self.pieces]


def _padded(flat: torch.Tensor, *, ranks: int) -> torch.Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % ranks), value=torch.nan)


@pytest.fixture(params=[1, 40, 10**6])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of that many elements, and matrices iterated one by one: a product of several at a time may round
    otherwise than that of fewer, which is no matter of who holds what."""
    monkeypatch.setattr(spread_module, "BUCKET_ELEMENTS", request.param)
    monkeypatch.setattr(spread_module, "orthogonalise_all", _one_by_one)


def _one_by_one(stacks: Sequence[torch.Tensor], *, steps: int) -> list[torch.Tensor]:
    found = [[orthogonalise(matrix, steps=steps) for matrix in stack] for stack in stacks]
    return [torch.stack(own) if own else stack.bfloat16() for own, stack in zip(found, stacks, strict=True)]


@pytest.mark.parametrize("kind", ["whole", "as_one", "apart"])
@pytest.mark.parametrize(("parts", "copies"), [(1, 1), (1, 2), (1, 5), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (4, 3)])
@pytest.mark.usefixtures("exact")
def test_parts_and_pieces_move_every_bit_as_whole_matrices_do(kind: str, parts: int, copies: int) -> None:
    values, gradients = draw(0), [draw(seed) for seed in range(1, STEPS + 1)]
    yardstick = Rank("whole", values, team=Team())
    for step in gradients:
        yardstick.step(step)
    along = [Meeting(parts) for _ in range(copies)], [Meeting(copies) for _ in range(parts)]
    done: dict[tuple[int, int], Rank] = {}

    def run(part: int, copy: int) -> None:
        team = Team(along[0][copy].peers(part), along[1][part].peers(copy))
        own = [{name: part_of(value, name, rank=part, ranks=parts) for name, value in each.items()}
               for each in (values, *gradients)]
        rank = Rank(kind, own[0], team=team)
        for step in own[1:]:
            rank.step(step)
        done[part, copy] = rank

    threads = [threading.Thread(target=run, args=(part, copy)) for part in range(parts) for copy in range(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == parts * copies
    names = (*MATRICES, VECTOR)
    for what in ("pieces", "momenta"):
        expected = getattr(yardstick, what) if what == "pieces" else yardstick.momenta()
        whole = {name: value.detach() for name, value in zip(names, expected, strict=True)}
        for (part, _), rank in done.items():
            mine = {name: part_of(value, name, rank=part, ranks=parts) for name, value in whole.items()}
            found = rank.pieces if what == "pieces" else rank.momenta()
            for piece, wanted in zip(found, rank.flatten(mine), strict=True):
                real = ~wanted.isnan()
                assert torch.equal(piece.detach()[real], wanted[real]), (what, part)


def test_pieces_cover_every_element_once_and_lie_where_zero_puts_them() -> None:
    lengths = [7, 1, 12, 4]
    flat = _padded(torch.arange(24.0), ranks=5).chunk(5)
    for rank in range(5):
        for first, own in zip((0, 7, 8, 20), cut_as_one(lengths, length=5, rank=rank, size=5), strict=True):
            wanted = torch.arange(24.0)[first:][own.bounds[rank] : own.bounds[rank + 1]]
            assert torch.equal(own.own(flat[rank], rank=rank), wanted)
        assert sum(own.size(rank) for own in cut_as_one(lengths, length=5, rank=rank, size=5)) == min(5, 24 - 5 * rank)
    apart = cut_apart(lengths, size=5, own=[2, 1, 3, 1])
    assert [own.bounds for own in apart] == [(0, 2, 4, 6, 7, 7), (0, 1, 1, 1, 1, 1), (0, 3, 6, 9, 12, 12),
                                             (0, 1, 2, 3, 4, 4)]
    assert [own.offset for own in apart] == [0, 2, 3, 6]


def test_buckets_hold_one_team_and_as_many_elements_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread_module, "BUCKET_ELEMENTS", 25)
    other = Team(copies=Meeting(1).peers(0))
    spreads = [Spread(torch.Size((n, 10)), team) for n, team in ((1, Team()), (1, other), (1, Team()), (4, Team()),
                                                                  (1, other), (1, Team()))]
    assert list(buckets(spreads)) == [[0, 2], [3], [5], [1, 4]]
    assert Team() == Team(ALONE, ALONE) != other
