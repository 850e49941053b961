"""In which order two halves of a layer's tokens travel and are computed, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.errors import LayoutError
from ernie5.model.config import ModelConfig
from ernie5.model.interfaces import Routing
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.halves import Halves


class Noted(torch.autograd.Function):
    """Writes a name down when it is run, and again when its gradient is."""

    @staticmethod
    def forward(ctx, x, name, notes):
        ctx.name, ctx.notes = name, notes
        notes.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.notes.append(ctx.name)
        return grad, None, None


@dataclasses.dataclass
class Half:
    """Rows that know which half they are of."""

    number: int
    rows: torch.Tensor


class NotedLayer:
    """A layer and its dispatcher in one; every stage writes its name and half down."""

    shared = True

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._halves = 0

    def _step(self, half: Half, name: str) -> Half:
        return Half(half.number, Noted.apply(half.rows, f"{name} {half.number}", self.notes))

    def prepare(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> Half:
        assert routing.choices.shape[0] == routing.weights.shape[0] == hidden.shape[0] and num_experts == 3
        self._halves += 1
        return Half(self._halves, hidden)

    def ship(self, half: Half) -> Half:
        return self._step(half, "ship")

    def receive(self, half: Half) -> Half:
        return self._step(half, "receive")

    def run_shared(self, hidden: torch.Tensor) -> torch.Tensor:
        return Noted.apply(hidden, "shared", self.notes)

    def run_experts(self, half: Half) -> Half:
        return self._step(half, "experts")

    def go_home(self, half: Half, *, parcels: Half) -> Half:
        assert parcels.number == half.number
        return self._step(half, "go home")

    def come_home(self, half: Half, *, parcels: Half) -> torch.Tensor:
        assert parcels.number == half.number
        return self._step(half, "come home").rows


@pytest.mark.parametrize("tokens", [1, 4, 5])
def test_experts_of_one_half_run_while_the_other_travels(tokens: int) -> None:
    layer = NotedLayer()
    hidden = torch.arange(2.0 * tokens).view(1, tokens, 2).requires_grad_()
    routing = Routing(torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2), 3)
    out = Halves(layer, dispatcher=layer)(hidden, routing=routing)
    assert torch.equal(out, 2 * hidden)
    assert layer.notes == [
        "ship 1", "ship 2", "shared", "receive 1", "experts 1", "go home 1", "receive 2", "experts 2", "go home 2",
        "come home 1", "come home 2",
    ]
    layer.notes.clear()
    out.sum().backward()
    assert torch.equal(hidden.grad, torch.full_like(hidden, 2.0))
    assert layer.notes == [
        "come home 2", "come home 1", "go home 2", "experts 2", "receive 2", "go home 1", "experts 1", "receive 1",
        "shared", "ship 2", "ship 1",
    ]


def test_halves_need_ranks_to_travel_between_and_no_shared_experts() -> None:
    with pytest.raises(LayoutError, match="overlap = 'halves': parallel.ep is 1"):
        ParallelConfig(overlap="halves")
    with pytest.raises(LayoutError, match="allgather does not run beside other work"):
        ParallelConfig(ep=2, overlap="halves", dispatcher="allgather")
    ParallelConfig(ep=2, overlap="halves").check_model(ModelConfig())
