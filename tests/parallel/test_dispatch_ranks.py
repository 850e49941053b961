"""Dispatchers over four ranks equal one process, gradients included, on awkward shapes; and what they send is counted.

All cases run in the same four forked processes, in float64; the yardstick is the local dispatcher on each rank's
tokens, with the experts' gradients summed over ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from ernie5.errors import LayoutError
from ernie5.model.interfaces import Parcels, Routing
from ernie5.model.moe.dispatch import LocalDispatcher
from ernie5.parallel.dims import GridDims
from ernie5.parallel.dispatchers import make_dispatcher
from ernie5.parallel.halves import Halves
from ernie5.parallel.nodes import split_into_nodes
from ernie5.parallel.state import ParallelState, build_state
from ernie5_kernels.token_rows import collect_rows, spread_rows

RANKS, EXPERTS, WIDTH = 4, 8, 3
ROW_BYTES = WIDTH * 8
# sums of float64 numbers in another order
TOLERANCE = 1e-12


@dataclasses.dataclass(frozen=True)
class Case:
    """tokens per rank; top_k; the experts that may be chosen."""

    tokens: tuple[int, ...]
    top_k: int
    experts: tuple[int, ...] = tuple(range(EXPERTS))


CASES = {
    "uneven": Case((13, 5, 8, 1), 2),
    "ranks without tokens": Case((0, 7, 0, 3), 3),
    "no token at all": Case((0, 0, 0, 0), 2),
    "all tokens to one rank": Case((9, 4, 6, 5), 2, experts=(4, 5)),
    "ranks whose experts get no token": Case((6, 6, 6, 6), 2, experts=(1, 2, 6)),
    "all but one expert": Case((5, 3, 4, 2), EXPERTS - 1),
    "every expert": Case((3, 2, 0, 4), EXPERTS),
}
FORMS = {
    "alltoall": {"name": "alltoall"},
    "beside other work": {"name": "alltoall", "overlaps": True},
    "two nodes, flat": {"name": "alltoall", "node_size": 2},
    "two nodes of two": {"name": "hierarchical", "node_size": 2},
    "nodes of three and one": {"name": "hierarchical", "node_size": 3},
    "one rank per node": {"name": "hierarchical", "node_size": 1},
    "one node": {"name": "hierarchical", "node_size": 4},
    "two nodes, beside other work": {"name": "hierarchical", "node_size": 2, "overlaps": True},
    "halves": {"name": "alltoall", "overlaps": True, "halves": True},
    "two nodes, halves": {"name": "hierarchical", "node_size": 2, "overlaps": True, "halves": True},
    "halves, pairs share experts": {"name": "alltoall", "overlaps": True, "halves": True,
                                    "dims": GridDims(dp=4, ep=2, etp=2)},
    "allgather": {"name": "allgather"},
    "two nodes, pairs share experts": {"name": "hierarchical", "node_size": 2, "dims": GridDims(dp=4, ep=2, etp=2)},
}


def choose(case: Case, *, rank: int) -> torch.Tensor:
    """Distinct choices [N, K] of one rank's tokens."""
    generator = torch.Generator().manual_seed(7 + rank)
    allowed = torch.tensor(case.experts)
    orders = [torch.randperm(len(allowed), generator=generator) for _ in range(case.tokens[rank])]
    picked = [allowed[order[: case.top_k]] for order in orders]
    return torch.stack(picked) if picked else torch.empty(0, case.top_k, dtype=torch.int64)


class Layer:
    """Expert e multiplies by matrices[e]; the gate weight is applied on its side; something runs beside the way."""

    def __init__(self, dispatcher: object, *, matrices: torch.Tensor, is_halved: bool) -> None:
        self.dispatcher, self.matrices, self.shared = dispatcher, matrices, True
        if is_halved:
            self.run_routed = Halves(self, dispatcher=dispatcher)

    def run_routed(self, hidden: torch.Tensor, *, routing: Routing) -> torch.Tensor:
        sent = self.dispatcher.send(hidden.flatten(0, 1), routing=routing, num_experts=EXPERTS)
        beside, parcels = self.run_shared(hidden), self.dispatcher.receive(sent)
        return self.dispatcher.combine(self.run_experts(parcels), parcels=parcels).view_as(hidden) + beside

    def run_shared(self, hidden: torch.Tensor) -> torch.Tensor:
        return (hidden * 3.0).sin()

    def run_experts(self, parcels: Parcels) -> torch.Tensor:
        arranged = self.dispatcher.arrange(parcels)
        ends, rows = arranged.offsets.tolist(), spread_rows(parcels.rows, plan=arranged.plan)
        spans = zip([0, *ends[:-1]], ends, self.matrices, strict=True)
        outputs = torch.cat([rows[start:end] @ matrix for start, end, matrix in spans])
        return collect_rows(outputs * arranged.row_weights.unsqueeze(1), plan=arranged.plan)


def grow(dispatcher: object, *, case: Case, matrices: torch.Tensor, is_halved: bool = False) -> list[torch.Tensor]:
    """Output, and gradients of hidden states, gate weights and matrices."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    choices = choose(case, rank=rank)
    hidden = torch.randn(len(choices), WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(choices.shape, dtype=torch.float64, generator=generator).requires_grad_()
    routing = Routing(choices=choices, weights=weights, num_experts=EXPERTS)
    matrices = matrices.clone().requires_grad_()
    out = Layer(dispatcher, matrices=matrices, is_halved=is_halved).run_routed(hidden.unsqueeze(0), routing=routing)
    (out.cos() * torch.arange(1, 1 + out.numel()).view_as(out)).sum().backward()
    return [out.detach().squeeze(0), hidden.grad, weights.grad, matrices.grad]


def unique_bytes(case: Case, *, state: ParallelState, places: tuple[int, ...]) -> int:
    """Bytes of one row per pair of this rank's tokens and another place that holds any of its experts."""
    held = EXPERTS // state.ep.size
    here = places[state.ep.coordinate]
    chosen = choose(case, rank=state.rank) // held
    return ROW_BYTES * sum(len({places[rank] for rank in row} - {here}) for row in chosen.tolist())


def check_form(form: dict, *, case: Case) -> list[int]:
    """Compare with one process; bytes (sent, between nodes, due to other ranks, due to other nodes) of this rank."""
    state = build_state(form.get("dims", GridDims(dp=RANKS, ep=RANKS)), node_size=form.get("node_size"))
    dispatcher = make_dispatcher(form["name"], state=state, overlaps=form.get("overlaps", False))
    matrices = torch.randn(EXPERTS, WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    expected = grow(LocalDispatcher(), case=case, matrices=matrices)
    dist.all_reduce(expected[3])
    held, first = EXPERTS // state.ep.size, state.ep.coordinate * EXPERTS // state.ep.size
    mine = matrices[first : first + held]
    parts = torch.eye(WIDTH, dtype=torch.float64).chunk(state.etp.size, dim=1)[state.etp.coordinate]
    mine = mine @ parts @ parts.T  # etp: some columns, the others zero
    found = grow(dispatcher, case=case, matrices=mine, is_halved=form.get("halves", False))
    expected[3] = expected[3][first : first + held] if state.etp.size == 1 else found[3]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE), form
    traffic = state.traffic
    return [
        traffic.sent_bytes["hidden"], traffic.node_bytes["hidden"],
        unique_bytes(case, state=state, places=tuple(range(state.ep.size))),
        unique_bytes(case, state=state, places=state.ep.nodes),
    ]


def run_all() -> dict[tuple[str, str], list[int]]:
    return {
        (form, name): check_form(options, case=case) for form, options in FORMS.items() for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def counted(run_ranks_once: Callable) -> dict[tuple[str, str], list[int]]:
    """Bytes of every form and case, summed over ranks; running it compares outputs and gradients."""
    results = run_ranks_once(run_all, RANKS)
    return {key: [sum(result[key][i] for result in results) for i in range(4)] for key in results[0]}


def test_every_form_equals_one_process_on_awkward_shapes(counted: dict) -> None:
    assert set(counted) == {(form, name) for form in FORMS for name in CASES}
    assert counted["alltoall", "uneven"][2] > counted["two nodes of two", "uneven"][3] > 0


@pytest.mark.parametrize("case", CASES)
def test_flat_dispatch_sends_a_token_once_to_each_rank(counted: dict, case: str) -> None:
    for form in ("alltoall", "beside other work", "two nodes, flat", "halves"):
        sent, _, due, _ = counted[form, case]
        assert sent == 4 * due, form  # dispatch and combine, forward and backward: nothing but the rows themselves


@pytest.mark.parametrize("case", CASES)
def test_hierarchical_dispatch_sends_a_token_once_to_each_node(counted: dict, case: str) -> None:
    for form in FORMS:
        if FORMS[form]["name"] == "hierarchical":
            _, between, _, due = counted[form, case]
            assert between == 4 * due, form


def test_flat_dispatch_crosses_the_border_once_per_rank_beyond_it(counted: dict) -> None:
    """Where a token needs all four ranks, flat dispatch sends it to both of the other node, hierarchical to one."""
    flat, staged = counted["two nodes, flat", "every expert"], counted["two nodes of two", "every expert"]
    assert flat[1] == 2 * staged[1] > 0


def test_nodes_follow_what_the_launcher_said_on_every_rank() -> None:
    assert split_into_nodes([4, 4, 4, 4]) == (0, 0, 0, 0)
    assert split_into_nodes([3, 3, 3, 1]) == (0, 0, 0, 1)
    assert split_into_nodes([1, 1]) == (0, 1)
    with pytest.raises(LayoutError, match=r"from rank 2 on, 3 ranks should state 3.*parallel.node_size"):
        split_into_nodes([2, 2, 3, 2])
    with pytest.raises(LayoutError, match="node by node"):
        split_into_nodes([2, 1])


def build_under_contradicting_launchers() -> tuple[int, ...]:
    os.environ["LOCAL_WORLD_SIZE"] = str(1 + dist.get_rank())
    with pytest.raises(LayoutError, match="parallel.node_size"):
        build_state(GridDims(dp=2, ep=2))
    return build_state(GridDims(dp=2)).world.nodes


def test_without_experts_on_other_ranks_nobody_asks_the_launcher_for_nodes(run_ranks: Callable) -> None:
    """`parallel.node_size`, the way out of what it may say, is refused there."""
    assert run_ranks(build_under_contradicting_launchers, 2) == [(0, 0), (0, 0)]
