"""Every row of the layout table trains the model of one process, name by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from layout_compare import SCORE_GAP, compare
from layout_jobs import Layouts
from layout_replay import Divergence, first_divergences
from layout_rows import LONG, MEASURED, ROWS, Row


def rows(names: Iterable[str]) -> list:
    """Rows as parameters of a test."""
    found = [ROWS[name] for name in names]
    return [pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else []) for row in found]


@pytest.mark.parametrize("row", rows(ROWS))
def test_a_layout_trains_the_model_of_one_process(row: Row, layouts: Layouts) -> None:
    found = compare(layouts.result(row), expected=layouts.result(row.yardstick()), row=row)
    assert not found.complaints(row.tolerances)
    assert row.precision == "bf16" or not found.divergences


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(LONG))
def test_twenty_steps_with_the_same_choices_end_at_the_same_weights(row: Row, long_layouts: Layouts) -> None:
    found = compare(long_layouts.result(row), expected=long_layouts.result(row.yardstick()), row=row)
    print("first choices that would have been others:", *found.first)
    assert not found.complaints(row.tolerances)
    assert all(one.gap < SCORE_GAP for one in found.first)


@pytest.mark.parametrize("row", rows(name for name, row in ROWS.items() if row.third))
def test_a_checkpoint_is_whole_and_goes_on_as_if_nothing_had_been(row: Row, layouts: Layouts) -> None:
    result, expected = layouts.result(row)["third"], layouts.result(row.yardstick())["third"]
    for kind in ("parameters", "moments", "buffers"):
        assert set(vars(result["written"])[kind]) == set(vars(expected["written"])[kind])
        for key, value in vars(result["written"])[kind].items():
            assert torch.equal(vars(result["read"])[kind][key], value), key
    for key, value in result["straight"].parameters.items():  # the layout is unchanged: bit for bit
        assert torch.equal(result["after"].parameters[key], value), key
    assert result["norm"] == result["straight_norm"] == pytest.approx(expected["norm"], rel=1e-3)
    # the third step starts from states that two steps have moved apart by rounding
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)


@pytest.mark.parametrize("row", rows(name for name in ROWS if f"{name}-again" in ROWS))
def test_a_layout_run_twice_is_bit_identical(row: Row, layouts: Layouts) -> None:
    assert_same_bits(layouts.result(row), layouts.result(ROWS[f"{row.name}-again"]))


@pytest.mark.parametrize("row", rows(["ep2-one-rank-full", "ep2-one-rank-operators", "pp2-vpp2-recompute"]))
def test_recompute_changes_no_bit(row: Row, layouts: Layouts) -> None:
    plain = dataclasses.replace(row, settings={})
    name = next(one.name for one in ROWS.values() if dataclasses.replace(one, name=row.name, slow=row.slow) == plain)
    assert_same_bits(layouts.result(ROWS[name]), layouts.result(row))


def assert_same_bits(first: dict, second: dict) -> None:
    """Losses, norms, loads and the whole state."""
    assert first["norms"] == second["norms"] and first["losses"] == second["losses"]
    assert all(torch.equal(one, other) for one, other in zip(first["loads"], second["loads"], strict=True))
    for kind in ("parameters", "moments", "buffers"):
        for key, value in vars(first["state"])[kind].items():
            assert torch.equal(vars(second["state"])[kind][key], value), key


def test_the_hostile_cases_are_what_they_are_called(layouts: Layouts) -> None:
    one_rank, idle = (
        layouts.result(ROWS[name].yardstick()) for name in ("ep2-all-tokens-to-one-rank", "ep2-expert-without-token")
    )
    for loads in one_rank["loads"]:
        assert loads.sum(1)[:, 4:].sum() == 0 and loads.sum(1)[:, :2].sum() > 0
    for loads in idle["loads"]:
        assert loads.sum(1)[:, 6].sum() == 0
    assert any(name.endswith("experts.down") and not bool(gradient[6].any())
               for name, gradient in idle["gradients"].items())


@pytest.mark.slow
def test_the_other_hostile_cases_are_what_they_are_called(layouts: Layouts) -> None:
    loads = layouts.result(ROWS["ep2-all-tokens-to-one-expert"].yardstick())["loads"]
    tokens = [step.sum((1, 2)) / 2 for step in loads]  # two experts per token
    assert all(torch.equal(step.sum(1)[:, 5], number) for step, number in zip(loads, tokens, strict=True))
    few = layouts.result(ROWS["cp4-one-token-per-rank"].yardstick())["loads"]
    assert all(step.sum() <= 4 * 4 * 2 * step.shape[0] for step in few)  # rows, tokens, experts per token, layers


def test_each_token_travels_once_to_each_rank_that_holds_its_experts(layouts: Layouts) -> None:
    counted = layouts.result(ROWS["ep2"])["bytes"]
    assert counted["unique_bytes"] > 0
    # dispatch and combine, each forward and backward; the bound is 1.02: nothing but the rows themselves moves
    assert counted["sent"]["hidden"] == 4 * counted["unique_bytes"]
    assert counted["sent"]["ids"] > 0 and counted["sent"]["weights"] > 0 and counted["sent"]["counts"] > 0


@pytest.mark.slow
def test_a_stage_keeps_activations_of_as_many_micro_batches_as_stages_are_behind_it(layouts: Layouts) -> None:
    one, four, eight = (layouts.result(row)["kept_bytes"] for row in MEASURED)
    # rows have the same tokens, and not quite the same numbers of targets
    assert [b / a for a, b in zip(one, four, strict=True)] == pytest.approx([2.0, 1.0], rel=0.05)
    assert eight == pytest.approx(four, rel=0.02)


def test_the_comparison_finds_one_wrong_number_of_each_kind(layouts: Layouts) -> None:
    row = ROWS["ep2"]
    result, expected = layouts.result(row), layouts.result(row.yardstick())

    def complaints(**wrong: object) -> str:
        return " ".join(compare({**result, **wrong}, expected=expected, row=row).complaints(row.tolerances))

    gradients = {name: value.clone() for name, value in result["gradients"].items()}
    name, gradient = max(gradients.items(), key=lambda item: item[1].numel())
    gradient.view(-1)[0] += 2e-5 * gradient.abs().max()
    assert complaints(gradients=gradients).startswith(f"gradients: 2.0e-05 at {name}")
    assert "names of gradients" in complaints(gradients={name: gradient})
    assert "norms" in complaints(norms=[result["norms"][0], 1.001 * result["norms"][1]])
    assert "norms" in complaints(norms=[result["norms"][0], float("nan")])
    assert "expert loads of step 1" in complaints(loads=[result["loads"][0], result["loads"][1] + 1])
    assert "losses: 1.0e-03 at step 1 term 0" in complaints(
        losses=[result["losses"][0], [1.001 * result["losses"][1][0], *result["losses"][1][1:]]]
    )


def test_only_the_first_divergences_of_a_run_count() -> None:
    early, later, caused = Divergence(3, 0, 1, 7, 1e-7), Divergence(3, 1, 2, 9, 2e-7), Divergence(3, 0, 2, 7, 0.1)
    assert first_divergences({early, later, caused, Divergence(4, 0, 0, 1, 0.3)}) == [early, later]
    assert first_divergences(set()) == []
