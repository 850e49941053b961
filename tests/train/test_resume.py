"""Interrupting and resuming a run, from outside, as a user does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint.manifest import RunState
from ernie5.model import init
from ernie5.train import loop
from ernie5.train.command import main
from ernie5.train.state import Progression


@pytest.fixture(scope="module")
def whole_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six steps, in this process."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert main([str(world / "run.yaml"), f"train.run_dir={run_dir}"]) == 0
    return run_dir


def test_a_run_leaves_metrics_checkpoints_config_and_exit_record(whole_run: Path, read_rows: Callable) -> None:
    rows = read_rows(whole_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    wanted = {"tokens", "loss", "loss/text", "loss/image", "loss/video", "loss/audio", "loss/objective", "grad_norm",
              "lr", "moe/load_entropy", "moe/max_load_ratio"}
    assert wanted <= set(rows[0])
    assert "validation/loss/text" in rows[2] and "validation/loss/text" not in rows[0]
    assert json.loads((whole_run / "exit.json").read_text())["exit_code"] == 0
    assert [path.name for path in sorted((whole_run / "checkpoints").glob("step-*"))] == [
        "step-00000004", "step-00000006"]
    assert (whole_run / "checkpoints" / "latest").read_text().strip() == "step-00000006"
    assert (whole_run / "config.yaml").is_file() and (whole_run / "routing.jsonl").is_file()


def test_a_run_killed_in_the_middle_repeats_the_uninterrupted_losses_bit_for_bit(
    whole_run: Path, start_train: Callable[..., subprocess.Popen], read_rows: Callable, tmp_path: Path
) -> None:
    process = start_train("killed", "train.steps=6")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and metrics.read_text("utf-8").count("\n") >= 3:
            break
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (tmp_path / "killed" / "exit.json").exists()
    again = start_train("killed")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "resumed from" in errors
    assert read_rows(tmp_path / "killed") == read_rows(whole_run)


@pytest.mark.parametrize(
    "settings",
    [
        ("engine.kind=local", "engine.precision=bf16"),
        ("engine.kind=grid",),
        ("engine.kind=deepspeed", "engine.zero_stage=1", "engine.precision=bf16"),
        ("engine.kind=deepspeed", "engine.zero_stage=3"),
    ],
)
def test_a_start_that_reads_a_checkpoint_draws_nothing_and_repeats_the_losses_bit_for_bit(
    settings: tuple[str, ...], world: Path, tmp_path: Path, read_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of fewer elements than marks have are drawn all the same: they cost nothing."""
    drawn, draw = [], init._draw

    def note(part: torch.Tensor, **known: object) -> None:
        drawn.append(part.numel())
        draw(part, **known)

    monkeypatch.setattr(init, "_draw", note)
    common = [str(world / "run.yaml"), "train.eval_every_steps=0", "optim.schedule.warmup_steps=1",
              "model.moe.balance.speed=0.01", *settings]
    main([*common, f"train.run_dir={tmp_path / 'whole'}", "train.steps=4"])
    assert max(drawn) > 10 * init.MARK_ELEMENTS
    main([*common, f"train.run_dir={tmp_path / 'parted'}", "train.steps=2"])
    drawn.clear()
    main([*common, f"train.run_dir={tmp_path / 'parted'}", "train.steps=4"])
    assert all(count < init.MARK_ELEMENTS for count in drawn)
    assert "resumed from" in (tmp_path / "parted" / "log.txt").read_text("utf-8")
    assert read_rows(tmp_path / "parted") == read_rows(tmp_path / "whole")
    drawn.clear()
    main([*common, f"train.run_dir={tmp_path / 'new'}", f"train.init_from={tmp_path / 'whole'}", "train.steps=1"])
    assert all(count < init.MARK_ELEMENTS for count in drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("engine.kind=grid", "parallel.tp=2", "parallel.ep=2"),
        ("engine.kind=grid", "parallel.pp=2"),
        ("engine.kind=deepspeed", "engine.zero_stage=3", "parallel.tp=2", "parallel.etp=2", "engine.precision=bf16"),
        ("engine.kind=deepspeed", "engine.zero_stage=2", "parallel.ep=2"),
    ],
)
def test_ranks_that_read_a_checkpoint_pass_the_check_of_copies_and_repeat_the_losses(
    settings: tuple[str, ...], world: Path, repository: Path, tmp_path: Path, read_rows: Callable
) -> None:
    for name, steps in (("whole", 4), ("parted", 2), ("parted", 4)):
        done = subprocess.run(
            [sys.executable, str(repository / "launch" / "spawn.py"), "2", str(world / "run.yaml"), *settings,
             f"train.run_dir={tmp_path / name}", f"train.steps={steps}", "train.eval_every_steps=0",
             "optim.schedule.warmup_steps=1", "model.moe.balance.speed=0.01"],
            capture_output=True, text=True, timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert read_rows(tmp_path / "parted") == read_rows(tmp_path / "whole")


def test_a_start_from_an_earlier_checkpoint_that_dies_before_its_first_save_is_gone_on_with(
    world: Path, tmp_path: Path, read_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    arguments = [str(world / "run.yaml"), f"train.run_dir={run_dir}", "train.routing_every_steps=3"]
    main([*arguments, "train.steps=4"])
    with monkeypatch.context() as patch:
        patch.setattr("ernie5.train.loop._run_step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*arguments, "train.steps=5", "--resume", str(run_dir / "checkpoints" / "step-00000002")])
    main([*arguments, "train.steps=5"])
    assert [row["step"] for row in read_rows(run_dir)] == [1, 2, 3, 4, 5]
    lines = [json.loads(line) for line in (run_dir / "routing.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert count_choices(lines) == 2 * read_rows(run_dir)[-1]["tokens"]  # two experts per token


def count_choices(lines: list[dict]) -> int:
    """Choices of the first layer over all lines of routing.jsonl."""
    return int(sum(torch.tensor(line["group_loads"]).sum(dim=(1, 2))[0] for line in lines))


def test_the_state_in_memory_after_every_step_adds_no_line_of_routing_and_loses_no_count(
    world: Path, tmp_path: Path, read_rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is saved as a checkpoint is: a line for each would be the larger part of a long run's files."""
    run_dir, whole, calls = tmp_path / "run", loop._run_step, []
    monkeypatch.setenv("ERNIE5_REPLICA", str(tmp_path / "memory"))
    arguments = [str(world / "run.yaml"), f"train.run_dir={run_dir}", "train.routing_every_steps=3", "train.steps=7",
                 "checkpoint.every_steps=0"]

    def run_step(*given: object, **named: object) -> object:
        calls.append(1)
        return whole(*given, **named) if len(calls) <= 5 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_run_step", run_step)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    main(arguments)
    assert "at step 5" in (run_dir / "log.txt").read_text("utf-8")
    lines = [json.loads(line) for line in (run_dir / "routing.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert count_choices(lines) == 2 * read_rows(run_dir)[-1]["tokens"]


def test_steps_are_logged_whoever_writes_their_figures(world: Path, tmp_path: Path) -> None:
    """Figures that a checkpoint hurried, or the copy in memory after every step, were in no line of the log."""
    main([str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", "observe.flush_every_steps=5",
          "observe.log_every_steps=3", "train.steps=7"])
    log = (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert [step for step in range(1, 8) if f"INFO step {step}: loss" in log] == [3, 6, 7]


def test_tokens_follow_the_batch_ramp_and_a_resume_inside_it_repeats_the_losses_bit_for_bit(
    world: Path, tmp_path: Path, read_rows: Callable
) -> None:
    run_dir = tmp_path / "run"
    arguments = [str(world / "run.yaml"), f"train.run_dir={run_dir}", "train.steps=5", "batch.global_sequences=6",
                 "batch.ramp=[{steps: 3, global_sequences: 2}, {steps: 1, global_sequences: 4}]", "checkpoint.keep=3"]
    main(arguments)
    straight = read_rows(run_dir)
    assert [row["tokens"] for row in straight] == [96 * rows for rows in (2, 4, 6, 10, 16)]  # text fills every row
    main([*arguments, "--resume", str(run_dir / "checkpoints" / "step-00000002")])
    assert read_rows(run_dir) == straight


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_once_and_exits_75_with_the_checkpoint_named(
    number: signal.Signals, start_train: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    process = start_train("signalled", "train.steps=1000", "checkpoint.every_steps=0")
    metrics = tmp_path / "signalled" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    record = json.loads((tmp_path / "signalled" / "exit.json").read_text())
    assert record["exit_code"] == 75 and record["checkpoint"] in errors and "Traceback" not in errors
    assert len(list((tmp_path / "signalled" / "checkpoints").glob("step-*"))) == 1


def test_a_run_goes_on_when_nobody_reads_its_stderr_any_more(
    start_train: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    process = start_train("unread", "observe.log_every_steps=1")
    assert "1 process" in process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    log = (tmp_path / "unread" / "log.txt").read_text("utf-8")
    assert log.count("nobody reads stderr any more") == 1 and "done: 6 steps" in log
    assert json.loads((tmp_path / "unread" / "exit.json").read_text())["exit_code"] == 0


def test_a_run_needs_no_stderr_and_writes_no_output_into_its_files(world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ernie5", "train", str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}",
               "train.steps=1"]
    done = subprocess.run(["bash", "-c", '"$@" 1>&- 2>&-', "-", *command], timeout=120, check=False)
    assert done.returncode == 0
    assert "done: 1 steps" in (tmp_path / "run" / "log.txt").read_text("utf-8")


def test_a_window_of_sums_as_checkpoints_once_held_it_begins_anew() -> None:
    progression = Progression()
    progression.restore(RunState(step=3, tokens=9, data={}, rng={}, recent_losses=[20.0, 19.0]))
    assert (progression.step, progression.recent_losses) == (3, {})


def test_a_longer_run_continues_a_finished_one_and_fresh_starts_over(
    world: Path, tmp_path: Path, read_rows: Callable
) -> None:
    arguments = [str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", "optim.schedule.warmup_steps=1"]
    main([*arguments, "train.steps=2"])
    main([*arguments, "train.steps=3"])
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").read_text("utf-8"))
    windows = {name: [row[f"loss/{name}"] for row in rows if row[f"loss/{name}"] is not None]
               for name in ("text", "image", "video", "audio")}
    # the alarm's windows go on as well
    assert state["run"]["recent_losses"] == {name: losses for name, losses in windows.items() if losses}
    main([*arguments, "train.steps=1", "--fresh"])
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1]


def test_a_start_of_a_finished_run_leaves_its_record_of_settings_and_figures(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = [str(world / "run.yaml"), f"train.run_dir={run_dir}"]
    main([*arguments, "train.steps=2"])
    kept = {name: (run_dir / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "routing.jsonl")}
    assert main([*arguments, "train.steps=1", "optim.learning_rate=0.5"]) == 0
    assert {name: (run_dir / name).read_bytes() for name in kept} == kept
    log = (run_dir / "log.txt").read_text("utf-8")
    assert "has 2 of 1 steps, and no setting of this start is used. Go on with more train.steps, or" in log
    assert json.loads((run_dir / "exit.json").read_text("utf-8"))["step"] == 2
    main([*arguments, "train.steps=3"])
    assert "optim.learning_rate was 0.5" not in (run_dir / "log.txt").read_text("utf-8")
