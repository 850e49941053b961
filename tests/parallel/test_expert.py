"""The staged dispatchers on one rank equal the local one, gradients included, on shapes that hurt."""

from __future__ import annotations

import pytest
import torch

from ernie5.model.interfaces import Routing
from ernie5.model.moe.dispatch import LocalDispatcher
from ernie5.parallel.dims import GridDims
from ernie5.parallel.dispatchers import make_dispatcher
from ernie5.parallel.state import build_state
from ernie5_kernels.token_rows import collect_rows, plan_rows, spread_rows

EXPERTS, WIDTH = 5, 3
FACTORS = torch.tensor([1.0, -2.0, 0.5, 3.0, 7.0], dtype=torch.float64)


def make_routing(choices: torch.Tensor) -> Routing:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(choices.shape, dtype=torch.float64, generator=generator).requires_grad_()
    return Routing(choices=choices, weights=weights, num_experts=EXPERTS)


def run(dispatcher: object, *, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Expert e multiplies by FACTORS[e]; gate weights are applied on the expert's side."""
    parcels = dispatcher.receive(dispatcher.send(hidden, routing=routing, num_experts=EXPERTS))
    arranged = dispatcher.arrange(parcels)
    ends = arranged.offsets.tolist()
    lengths = torch.tensor([end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    factors = FACTORS.repeat_interleave(lengths)
    rows = spread_rows(parcels.rows, plan=arranged.plan) * (arranged.row_weights * factors).unsqueeze(1)
    return dispatcher.combine(collect_rows(rows, plan=arranged.plan), parcels=parcels)


def distinct_choices(tokens: int, *, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    rows = [torch.randperm(EXPERTS, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.empty(0, top_k, dtype=torch.int64)


CASES = {
    "63 tokens": distinct_choices(63, top_k=2),
    "one token": distinct_choices(1, top_k=3),
    "no token": distinct_choices(0, top_k=2),
    "all to one expert": torch.full((17, 1), 4),
    "an expert without tokens": distinct_choices(40, top_k=2).clamp(max=3),
}


@pytest.mark.parametrize("name", ["alltoall", "hierarchical", "allgather"])
@pytest.mark.parametrize("case", CASES)
def test_one_rank_equals_the_local_dispatcher(name: str, case: str) -> None:
    choices = CASES[case]
    hidden = torch.randn(len(choices), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    results = []
    for dispatcher in (LocalDispatcher(), make_dispatcher(name, state=build_state(GridDims()))):
        inputs, routing = hidden.clone().requires_grad_(), make_routing(choices)
        out = run(dispatcher, hidden=inputs, routing=routing)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append((out.detach(), inputs.grad, routing.weights.grad))
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_items_without_rows_are_summed_and_spread_as_a_scatter_does() -> None:
    owners = torch.tensor([4, 0, 4, 2, 0, 4])
    plan = plan_rows(owners, tokens=6)
    rows = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    items = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(6, 2, dtype=torch.float64).index_add(0, owners, rows.detach())
    assert torch.allclose(collect_rows(rows, plan=plan), expected)
    assert torch.equal(spread_rows(items, plan=plan), items[owners])
    assert torch.autograd.gradcheck(lambda x: collect_rows(x, plan=plan), (rows,))
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, plan=plan), (items,))


def test_rows_that_no_expert_chose_are_never_read() -> None:
    """NaN in memory beyond the rows in use must not reach a result."""
    poisoned = torch.full((64, WIDTH), torch.nan, dtype=torch.float64)
    poisoned[:9] = 1.0
    dispatcher = make_dispatcher("alltoall", state=build_state(GridDims()))
    out = run(dispatcher, hidden=poisoned[:9], routing=make_routing(distinct_choices(9, top_k=2)))
    assert bool(torch.isfinite(out).all()) and out.shape == (9, WIDTH)
