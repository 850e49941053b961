"""Parts of tensor parallelism by themselves: cross-entropy over a part of the vocabulary, cuts and gatherings."""

from __future__ import annotations

import types
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from ernie5.config.base import Config
from ernie5.errors import LayoutError
from ernie5.model.config import ModelConfig
from ernie5.parallel.apply import Cut, Layout, Shard
from ernie5.parallel.collectives import even_sizes, own_part
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.dims import GridDims
from ernie5.parallel.state import build_state
from ernie5.parallel.tensor import VocabularyParallelLoss, install_tensor
from ernie5_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference


def tp_axis() -> object:
    return build_state(GridDims(tp=dist.get_world_size())).tp


def parts_of_a_head(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int
) -> tuple[torch.Tensor, ...]:
    axis = tp_axis()
    loss = VocabularyParallelLoss(vocab_size=weight.shape[0], axis=axis)
    loss._rows = rows
    own = own_part(weight, axis=axis, sizes=even_sizes(weight.shape[0], axis=axis)).clone().requires_grad_()
    hidden = hidden.clone().requires_grad_()
    nats = loss(hidden, weight=own, targets=targets)
    (3.0 * nats).backward()
    with torch.no_grad():
        again = loss(hidden, weight=own, targets=targets)
    return nats.detach(), again, hidden.grad, own.grad


@pytest.mark.parametrize("ranks,rows,vocab,chunk", [(2, 23, 31, 5), (3, 1, 7, 64), (2, 0, 9, 4), (4, 6, 5, 6)])
def test_a_head_in_parts_has_the_loss_and_the_gradients_of_the_whole(
    run_ranks: Callable, ranks: int, rows: int, vocab: int, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(vocab)
    hidden = 4 * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    weight = 4 * torch.randn(vocab, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (rows,), generator=generator)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = linear_cross_entropy_reference(whole[0], weight=whole[1], targets=targets)
    (3.0 * expected).backward()
    results = run_ranks(parts_of_a_head, ranks, hidden, weight, targets, chunk)
    for nats, again, by_hidden, _ in results:
        assert abs(float(nats - expected.detach())) < 1e-10 and torch.equal(nats, again)  # fp64 sums in another order
        assert torch.allclose(by_hidden, whole[0].grad, atol=1e-12)
    assert torch.allclose(torch.cat([result[3] for result in results]), whole[1].grad, atol=1e-12)


def cut_and_gather(whole: torch.Tensor, cuts: tuple[Cut, ...], degrees: dict) -> tuple[torch.Tensor, torch.Tensor]:
    state = build_state(GridDims(**degrees))
    shard = Shard("weight", tuple(whole.shape), cuts, sum_axes=(), copy_axes=(), stages=(0,))
    layout = Layout(state, shards={"weight": shard})
    part = layout.cut(whole, name="weight")
    return part, layout.gather(part, name="weight")


@pytest.mark.parametrize(
    "shape,cuts,degrees",
    [
        ((7, 3), (Cut(0, "tp", 1),), {"tp": 2}),
        ((10, 3), (Cut(0, "tp", 2),), {"tp": 2}),  # gate and up of five columns each
        ((3, 5), (Cut(1, "tp", 1),), {"tp": 3}),
        ((4, 6, 2), (Cut(0, "ep", 1), Cut(1, "etp", 2)), {"dp": 4, "ep": 2, "etp": 2}),
    ],
)
def test_parts_come_together_as_the_whole(run_ranks: Callable, shape: tuple, cuts: tuple, degrees: dict) -> None:
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    ranks = 4 if "ep" in degrees else degrees["tp"]
    results = run_ranks(cut_and_gather, ranks, whole, cuts, degrees)
    assert all(torch.equal(gathered, whole) for _, gathered in results)
    assert sum(part.numel() for part, _ in results) == whole.numel()


def test_half_of_a_fused_matrix_is_half_of_each_of_its_parts(run_ranks: Callable) -> None:
    gate, up = torch.zeros(4, 1), torch.arange(1.0, 5.0).view(4, 1)
    parts = run_ranks(cut_and_gather, 2, torch.cat((gate, up)), (Cut(0, "tp", 2),), {"tp": 2})
    assert [part[0].flatten().tolist() for part in parts] == [[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 3.0, 4.0]]


def test_one_rank_changes_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    before, installed = dict(vars(model)), []

    def install(*exchanged: object) -> None:
        installed.append(exchanged)

    alone = types.SimpleNamespace(tp=types.SimpleNamespace(size=1))
    install_tensor(model, state=alone, install=install, is_sequence=True)
    assert not installed and vars(model) == before


def refused(config: Config, model: ModelConfig) -> str:
    with pytest.raises(LayoutError) as error:
        config.check_model(model)
    return str(error.value)


def test_degrees_that_do_not_fit_the_heads_are_refused_with_the_nearest_that_do() -> None:
    message = refused(ParallelConfig(tp=3), ModelConfig(query_heads=8, kv_heads=4))
    assert "tp = 3: does not share out model.query_heads = 8 and model.kv_heads = 4" in message and "2, 4" in message
    message = refused(ParallelConfig(tp=6), ModelConfig(query_heads=12, kv_heads=4))  # two thirds of a head for each
    assert "tp = 6: does not share out" in message and "work: 4, 12" in message
    assert "work: 2" in refused(ParallelConfig(tp=4), ModelConfig(query_heads=2, kv_heads=1))
    for tp in (1, 2, 4, 8):
        ParallelConfig(tp=tp).check_model(ModelConfig(query_heads=8, kv_heads=2))
    model = ModelConfig(query_heads=6, kv_heads=2)
    message = refused(ParallelConfig(tp=2, cp=2, context="ulysses"), model)
    assert "does not divide the 3 query heads" in message and "parallel.context: ring" in message
    ParallelConfig(tp=2, cp=2).check_model(model)
