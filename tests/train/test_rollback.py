"""Steps that go wrong, each a whole run: a corrupted batch, a gradient that is not finite, and no way out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.data.loader import Loader
from ernie5.engine.interface import StepSums
from ernie5.engine.local import LocalEngine
from ernie5.errors import NumericsError
from ernie5.train.command import main

STEPS = 9


@pytest.fixture
def arguments(world: Path, tmp_path: Path) -> list[str]:
    """A run of nine steps; with a window of eight, spikes are defined from the fifth on."""
    return [
        str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", f"train.steps={STEPS}",
        "train.eval_every_steps=0", "train.routing_every_steps=1", "observe.alarms.spike_window_steps=8",
    ]


@pytest.fixture
def corrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """corrupt(steps) spoils the batches of these steps of the data; returns the steps that were drawn."""

    def install(spoilt: set[int]) -> list[int]:
        drawn: list[int] = []
        whole = Loader.next_step

        def next_step(loader: Loader) -> list:
            drawn.append(loader.step + 1)
            batches = whole(loader)
            if loader.step in spoilt:
                for batch in batches:
                    batch.bit_targets.weights.mul_(1000.0)
            return batches

        monkeypatch.setattr(Loader, "next_step", next_step)
        return drawn

    return install


def test_a_corrupted_batch_is_rolled_back_and_left_out(
    arguments: list[str], corrupt: Callable, tmp_path: Path, read_rows: Callable
) -> None:
    drawn = corrupt({7})
    assert main([*arguments, "observe.alarms.on_spike=rollback"]) == 0
    assert drawn == list(range(1, STEPS + 2))  # step 7 met batch 7, returned to 6, went on with batch 8
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["loss"] for row in rows) < 2 * rows[0]["loss"]  # the spoilt batch is in no row
    log = (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert "step 7: loss" in log and "Back to" in log and "the data of steps 7 to 7 are left out" in log
    routing = [json.loads(line)["step"] for line in (tmp_path / "run" / "routing.jsonl").read_text().splitlines()]
    assert routing == list(range(1, STEPS + 1))
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text("utf-8"))
    assert state["run"]["step"] == STEPS and state["run"]["data"]["step"] == STEPS + 1


def test_a_corrupted_batch_can_be_dropped_without_a_trace_in_the_weights(
    arguments: list[str], corrupt: Callable, tmp_path: Path, read_rows: Callable
) -> None:
    corrupt({7})
    assert main([*arguments, "observe.alarms.on_spike=skip"]) == 0
    assert [row["skipped"] for row in read_rows(tmp_path / "run")] == [0, 0, 0, 0, 0, 0, 1, 0, 0]
    assert "the update is dropped (1 in a row)" in (tmp_path / "run" / "log.txt").read_text("utf-8")


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """spoil(calls) makes the gradients of these steps NaN, counted as they are run; returns one entry per step run."""

    def install(spoilt: set[int]) -> list[int]:
        whole, calls = LocalEngine.accumulate, []

        def accumulate(engine: LocalEngine, micro_batches: list) -> object:
            calls.append(1)
            sums = whole(engine, micro_batches)
            if len(calls) in spoilt:
                next(engine.model.parameters()).grad.fill_(torch.nan)
            return sums

        monkeypatch.setattr(LocalEngine, "accumulate", accumulate)
        return calls

    return install


def test_a_gradient_that_is_not_finite_is_rolled_back(
    arguments: list[str], tmp_path: Path, read_rows: Callable, spoil: Callable
) -> None:
    calls = spoil({4})
    assert main([*arguments, "observe.alarms.on_nan=rollback", "train.steps=6"]) == 0
    rows = read_rows(tmp_path / "run")
    assert [(row["step"], row["skipped"]) for row in rows] == [(step, 0) for step in range(1, 7)]
    assert len(calls) == 6 + 2  # steps 3 and 4 once more


def test_a_loss_that_is_not_finite_is_not_applied_though_its_gradients_are(
    arguments: list[str], tmp_path: Path, read_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum that overflows has finite gradients."""
    whole, seen = LocalEngine.accumulate, []

    def accumulate(engine: LocalEngine, micro_batches: list) -> StepSums:
        seen.append(next(engine.model.parameters()).detach().clone())
        sums = whole(engine, micro_batches)
        return dataclasses.replace(sums, objective=sums.objective + torch.inf) if len(seen) == 2 else sums

    monkeypatch.setattr(LocalEngine, "accumulate", accumulate)
    assert main([*arguments, "train.steps=4"]) == 0
    assert [row["skipped"] for row in read_rows(tmp_path / "run")] == [0, 1, 0, 0]
    assert "the update is dropped (1 in a row)" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])


@pytest.mark.parametrize("spoilt", [{6}, {5, 6}])
def test_a_run_whose_last_steps_are_not_finite_is_not_done(
    spoilt: set[int], arguments: list[str], tmp_path: Path, spoil: Callable
) -> None:
    spoil(spoilt)
    words = rf"step 6: loss .*nan: not finite.*last step \({len(spoilt)} in a row.*on_nan: rollback.*--resume"
    with pytest.raises(NumericsError, match=words):
        main([*arguments, "train.steps=6"])
    record = json.loads((tmp_path / "run" / "exit.json").read_text("utf-8"))
    assert (record["exit_code"], record["step"]) == (4, 6) and record["checkpoint"].endswith("step-00000004")
    assert not (tmp_path / "run" / "checkpoints" / "step-00000006").exists()
    assert main([*arguments, "train.steps=6", "observe.alarms.on_nan=rollback"]) == 0  # goes on from step 4


def test_a_skipped_step_before_a_good_last_one_is_no_error(
    arguments: list[str], tmp_path: Path, read_rows: Callable, spoil: Callable
) -> None:
    spoil({5})
    assert main([*arguments, "train.steps=6"]) == 0
    assert [row["skipped"] for row in read_rows(tmp_path / "run")] == [0, 0, 0, 0, 1, 0]


def test_returns_are_bounded_and_go_ever_farther_back(
    arguments: list[str], corrupt: Callable, tmp_path: Path
) -> None:
    corrupt(set(range(7, 40)))
    with pytest.raises(NumericsError, match=r"2 returns to a checkpoint did not help, train.spike_retries = 2"):
        main([*arguments, "observe.alarms.on_spike=rollback", "train.spike_retries=2"])
    record = json.loads((tmp_path / "run" / "exit.json").read_text("utf-8"))
    assert record["exit_code"] == 4
    returns = [line for line in (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines() if "Back to" in line]
    assert "step-00000006 (1 of 2)" in returns[0] and "step-00000004 (2 of 2)" in returns[1]


def test_an_alarm_before_the_first_checkpoint_says_so(
    arguments: list[str], corrupt: Callable
) -> None:
    corrupt({7})
    with pytest.raises(NumericsError, match="holds no checkpoint to return to. Lower checkpoint.every_steps"):
        main([*arguments, "observe.alarms.on_spike=rollback", "checkpoint.every_steps=0"])
