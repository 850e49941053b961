"""Expert parallelism in every engine and ZeRO stage trains the model of one process, name by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

CASES = ("usual", "one_rank", "idle_expert")


def row(name: str, *, engine: str = "grid", case: str = "usual", stage: int = 0, **extra: object) -> dict:
    parallel = {key: value for key, value in extra.items() if key in ("ep", "etp", "dispatcher")}
    rest = {key: value for key, value in extra.items() if key not in parallel}
    return {"name": name, "engine": engine, "case": case, "stage": stage, "rows": 4, "parallel": parallel, **rest}


LOCAL = [row(case, engine="local", case=case, third=True) for case in CASES]
TWO_RANKS = [
    row("dp2"),
    row("ep2", ep=2, count_bytes=True, third=True),
    row("ep2-again", ep=2),
    row("ep2-all-tokens-to-one-rank", ep=2, case="one_rank"),
    row("ep2-expert-without-token", ep=2, case="idle_expert"),
    row("ep2-allgather", ep=2, dispatcher="allgather"),
    row("etp2", etp=2),
    row("ep2-zero0", ep=2, engine="deepspeed"),
    row("ep2-zero1", ep=2, engine="deepspeed", stage=1, third=True),
    row("ep2-zero2", ep=2, engine="deepspeed", stage=2),
    row("ep2-zero3", ep=2, engine="deepspeed", stage=3, third=True),
]
FOUR_RANKS = [
    row("ep2-dp4", ep=2),
    row("ep2-etp2", ep=2, etp=2),
    row("ep2-dp4-zero1", ep=2, engine="deepspeed", stage=1),
]
FOUR_RANKS_SLOW = [
    row("ep4", ep=4, case="one_rank"),
    row("etp2-dp4", etp=2),
    row("etp4-allgather", etp=4, dispatcher="allgather"),
    row("ep2-dp4-zero0", ep=2, engine="deepspeed"),
    row("ep2-dp4-zero2", ep=2, engine="deepspeed", stage=2),
    row("ep2-dp4-zero3", ep=2, engine="deepspeed", stage=3),
    row("ep2-etp2-zero1", ep=2, etp=2, engine="deepspeed", stage=1),
    row("ep2-etp2-zero3", ep=2, etp=2, engine="deepspeed", stage=3),
    row("ep4-zero3", ep=4, engine="deepspeed", stage=3, case="one_rank"),
]


@pytest.fixture(scope="module")
def local(run_rows: Callable) -> dict[str, dict]:
    """The yardstick, by case."""
    return run_rows(LOCAL, ranks=1)


@pytest.fixture(scope="module")
def two_ranks(run_rows: Callable) -> dict[str, dict]:
    """All rows of two processes."""
    return run_rows(TWO_RANKS, ranks=2)


@pytest.fixture(scope="module")
def four_ranks(run_rows: Callable) -> dict[str, dict]:
    """The quick rows of four processes."""
    return run_rows(FOUR_RANKS, ranks=4)


@pytest.fixture(scope="module")
def four_ranks_slow(run_rows: Callable) -> dict[str, dict]:
    """The other rows of four processes."""
    return run_rows(FOUR_RANKS_SLOW, ranks=4)


@pytest.mark.parametrize("made", TWO_RANKS, ids=lambda made: made["name"])
def test_two_ranks_train_the_model_of_one_process(
    made: dict, two_ranks: dict, local: dict, check_row: Callable
) -> None:
    check_row(two_ranks[made["name"]], expected=local[made["case"]])


@pytest.mark.parametrize("made", FOUR_RANKS, ids=lambda made: made["name"])
def test_four_ranks_train_the_model_of_one_process(
    made: dict, four_ranks: dict, local: dict, check_row: Callable
) -> None:
    check_row(four_ranks[made["name"]], expected=local[made["case"]])


@pytest.mark.slow
@pytest.mark.parametrize("made", FOUR_RANKS_SLOW, ids=lambda made: made["name"])
def test_more_layouts_of_four_ranks_train_the_model_of_one_process(
    made: dict, four_ranks_slow: dict, local: dict, check_row: Callable
) -> None:
    check_row(four_ranks_slow[made["name"]], expected=local[made["case"]])


def test_the_hostile_cases_are_what_they_are_called(local: dict) -> None:
    for loads in local["one_rank"]["loads"]:
        assert loads.sum(1)[:, 4:].sum() == 0 and loads.sum(1)[:, :2].sum() > 0
    for loads in local["idle_expert"]["loads"]:
        assert loads.sum(1)[:, 6].sum() == 0
    assert any(name.endswith("experts.down") and not bool(gradient[6].any())
               for name, gradient in local["idle_expert"]["gradients"].items())


def test_a_layout_run_twice_is_bit_identical(two_ranks: dict) -> None:
    first, second = two_ranks["ep2"], two_ranks["ep2-again"]
    assert first["norms"] == second["norms"] and first["losses"] == second["losses"]
    for name, value in first["state"].parameters.items():
        assert torch.equal(second["state"].parameters[name], value), name


def test_each_token_travels_once_to_each_rank_that_holds_its_experts(two_ranks: dict) -> None:
    counted = two_ranks["ep2"]["bytes"]
    assert counted["unique_bytes"] > 0
    # dispatch and combine, each forward and backward; the bound is 1.02, nothing but the rows themselves moves
    assert counted["sent"]["hidden"] == 4 * counted["unique_bytes"]
    assert counted["sent"]["ids"] > 0 and counted["sent"]["weights"] > 0 and counted["sent"]["counts"] > 0


@pytest.mark.parametrize("name", ["ep2", "ep2-zero1", "ep2-zero3"])
def test_a_checkpoint_of_many_ranks_is_whole_and_goes_on_as_if_nothing_had_been(
    name: str, two_ranks: dict, local: dict
) -> None:
    result, expected = two_ranks[name]["third"], local["usual"]["third"]
    for kind in ("parameters", "moments", "buffers"):
        for key, value in vars(result["written"])[kind].items():
            assert torch.equal(vars(result["read"])[kind][key], value), key
    for key, value in result["straight"].parameters.items():  # the layout is unchanged: bit for bit
        assert torch.equal(result["after"].parameters[key], value), key
    assert result["norm"] == result["straight_norm"] == pytest.approx(expected["norm"], rel=1e-3)
    # the third step starts from states that two steps have moved apart by rounding
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
