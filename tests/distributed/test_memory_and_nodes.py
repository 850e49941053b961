"""Recompute, offload, dispatch over nodes and node-limited routing train the model of one process, name by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

FULL = {"recompute": "full"}
OPERATORS = {"recompute": "selective"}
HOST = {"offload_optimizer": "cpu"}
DEGREES = ("ep", "etp", "cp", "pp", "dispatcher", "node_size", "overlap")
GROUPED = {"moe": {"num_groups": 2, "shared_experts": 1}}


def row(name: str, *, case: str = "usual", stage: int | None = None, grouped: bool = False, **extra: object) -> dict:
    parallel = {key: value for key, value in extra.items() if key in DEGREES}
    rest = {key: value for key, value in extra.items() if key not in parallel}
    engine = "grid" if stage is None else "deepspeed"
    return {"name": name, "engine": engine, "case": case, "stage": stage or 0, "rows": 4, "parallel": parallel,
            "yardstick": f"{case}-grouped" if grouped else case, "model": GROUPED if grouped else {}, **rest}


LOCAL = [{**row(case, case=case), "engine": "local"} for case in ("usual", "one_rank")]
LOCAL += [{**row("usual-grouped", grouped=True), "engine": "local"}]
TWO_RANKS = [
    row("ep2-one-rank", ep=2, case="one_rank"),
    row("ep2-one-rank-full", ep=2, case="one_rank", settings=FULL),
    row("ep2-zero3-full", ep=2, stage=3, settings=FULL),
    row("ep2-zero1-host", ep=2, stage=1, settings=HOST),
]
FOUR_RANKS = [
    row("ep4-nodes-groups-beside", ep=4, dispatcher="hierarchical", node_size=2, grouped=True, overlap="shared"),
]
SLOW_RANKS = {
    2: [
        row("ep2-one-rank-operators", ep=2, case="one_rank", settings=OPERATORS),
        row("ep2-zero2-full", ep=2, stage=2, settings=FULL),
        row("ep2-zero1-one-rank-full", ep=2, stage=1, case="one_rank", settings=FULL),
        row("cp2-ep2-full", cp=2, ep=2, settings=FULL),
        row("ep2-zero2-host", ep=2, stage=2, settings=HOST),
        row("ep2-zero3-host", ep=2, stage=3, settings={**HOST, **FULL}),
    ],
    4: [
        row("ep4-uneven-nodes-one-rank", ep=4, dispatcher="hierarchical", node_size=3, case="one_rank"),
        row("ep2-etp2-nodes", ep=2, etp=2, dispatcher="hierarchical", node_size=2),
        row("ep4-nodes-zero3-full", ep=4, dispatcher="hierarchical", node_size=2, stage=3, settings=FULL),
        row("ep2-dp4-zero2-host", ep=2, stage=2, settings=HOST),
        row("pp2-ep2-full", pp=2, ep=2, settings=FULL),
    ],
}
SLOW = [(ranks, made) for ranks, rows in SLOW_RANKS.items() for made in rows]


@pytest.fixture(scope="module")
def local(run_rows: Callable) -> dict[str, dict]:
    """The yardsticks, by case."""
    return run_rows(LOCAL, ranks=1)


@pytest.fixture(scope="module")
def ranks(run_rows: Callable) -> dict[str, dict]:
    """The quick rows."""
    return {**run_rows(TWO_RANKS, ranks=2), **run_rows(FOUR_RANKS, ranks=4)}


@pytest.fixture(scope="module")
def slow_ranks(run_rows: Callable) -> dict[str, dict]:
    """The other rows."""
    return {name: found for number, rows in SLOW_RANKS.items() for name, found in run_rows(rows, ranks=number).items()}


@pytest.mark.parametrize("made", TWO_RANKS + FOUR_RANKS, ids=lambda made: made["name"])
def test_ranks_train_the_model_of_one_process(made: dict, ranks: dict, local: dict, check_row: Callable) -> None:
    check_row(ranks[made["name"]], expected=local[made["yardstick"]])


def test_recompute_changes_no_bit_where_a_rank_has_no_token_for_its_experts(ranks: dict) -> None:
    plain, repeated = ranks["ep2-one-rank"], ranks["ep2-one-rank-full"]
    assert plain["losses"] == repeated["losses"] and plain["norms"] == repeated["norms"]
    assert all(torch.equal(one, other) for one, other in zip(plain["loads"], repeated["loads"], strict=True))
    for kind in ("parameters", "moments", "buffers"):
        for name, value in vars(plain["state"])[kind].items():
            assert torch.equal(vars(repeated["state"])[kind][name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("number,made", SLOW, ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_more_ranks_train_the_model_of_one_process(
    number: int, made: dict, slow_ranks: dict, local: dict, check_row: Callable
) -> None:
    check_row(slow_ranks[made["name"]], expected=local[made["yardstick"]])
