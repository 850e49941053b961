"""Several ranks on one machine end as the run does: one message, the run's exit code, one reaction to a signal."""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE_SECONDS = 240


@pytest.fixture
def spawn(repository: Path, tmp_path: Path):
    """spawn(arguments) starts launch/spawn.py with two ranks and returns the process."""
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(repository / "launch" / "spawn.py"), *arguments], cwd=repository, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "RANK_LOGS": str(tmp_path / "ranks"), "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


def test_a_users_mistake_is_said_once_and_ends_with_2(spawn) -> None:
    process = spawn("2", "configs/pretrain/debug.yaml", "train.stepz=3")
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert said.count("ConfigError") == 1 and "train.stepz" in said and "Traceback" not in said


def test_a_run_directory_that_another_run_holds_is_said_once_and_ends_with_2(spawn, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".train.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        process = spawn("2", "tools/chaos/chaos.yaml", f"train.run_dir={tmp_path / 'run'}", "train.steps=1")
        _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2
    assert said.count("ConfigError") == 1 and "another run goes on there" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "exit.json").exists()


def test_a_wrong_number_of_processes_is_named(spawn) -> None:
    process = spawn("two", "configs/pretrain/debug.yaml")
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2 and "'two configs/pretrain/debug.yaml'" in said


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_file_in_the_place_of_the_ranks_logs_is_named(
    spawn, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "ranks").symlink_to(tmp_path / place)
    process = spawn("2", "configs/pretrain/debug.yaml", "train.steps=0")
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 2 and said.count("\n") == 1, said
    assert f"ConfigError: RANK_LOGS is '{tmp_path / 'ranks'}': a file stands in its place" in said
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(("end", "code", "said"), [
    ("os.kill(os.getpid(), 9)", 5, "rank 1 was killed by signal 9 (Killed)"),
    ("print('EnvironmentFault: disk full', file=sys.stderr); sys.exit(3)", 3, "rank 1: EnvironmentFault: disk full"),
])
def test_the_cause_is_said_where_rank_0_only_knows_that_a_peer_is_gone(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, end: str,
    code: int, said: str
) -> None:
    monkeypatch.syspath_prepend(repository / "launch")
    spawn = runpy.run_path(str(repository / "launch" / "spawn.py"))
    with (tmp_path / "rank-1.log").open("wb") as log:
        ranks = [
            subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"]),
            subprocess.Popen([sys.executable, "-c", f"import os, sys; {end}"], stderr=log),
        ]
        assert spawn["wait"](ranks, logs=tmp_path) == code  # of the cause, not of who missed it
    assert capsys.readouterr().err.strip() == said


def _wait_for_a_step(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text(encoding="utf-8"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_signal_while_the_ranks_are_being_started_reaches_them(repository: Path) -> None:
    program = f"""
import os, runpy, signal, subprocess, sys

sys.path.insert(0, {str(repository / "launch")!r})
main = runpy.run_path({str(repository / "launch" / "spawn.py")!r})["main"]

def start(num_processes, **_):
    os.kill(os.getpid(), signal.SIGTERM)
    return [subprocess.Popen(["sleep", "60"]) for _ in range(num_processes)]

main.__globals__["start"] = start
sys.argv = ["spawn.py", "2", "CONFIG"]
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=30, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl(2) is Linux's")
def test_a_killed_launcher_takes_its_ranks_along_and_they_save(spawn, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = spawn(
        "1", "configs/pretrain/debug.yaml", "train.steps=500", f"train.run_dir={run}", "checkpoint.every_steps=0",
        "observe.flush_every_steps=1",
    )
    _wait_for_a_step(run, process)
    process.kill()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (run / "exit.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    said = json.loads((run / "exit.json").read_text(encoding="utf-8"))
    assert said["exit_code"] == 75
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{said['step']:08d}"]


def test_two_ranks_train_and_a_signal_saves_once_and_ends_with_75(spawn, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = spawn(
        "2", "configs/pretrain/debug.yaml", "engine.kind=deepspeed", "batch.micro_sequences=2", "train.steps=500",
        f"train.run_dir={run}", "engine.cpu_threads=1", "checkpoint.every_steps=0", "observe.flush_every_steps=1",
    )
    _wait_for_a_step(run, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, said
    step = json.loads((run / "exit.json").read_text(encoding="utf-8"))["step"]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == [f"step-{step:08d}"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found in /proc")
def test_tensor_parallel_ranks_agree_on_saves_in_flight_and_on_a_signal_to_one_of_them(spawn, tmp_path: Path) -> None:
    """They see the same data, so a sum over data-parallel ranks tells none of them what another knows."""
    run = tmp_path / "run"
    process = spawn(
        "2", "configs/pretrain/debug.yaml", "engine.kind=grid", "parallel.tp=2", "model.kv_heads=2",
        "batch.micro_sequences=2", "train.steps=500", f"train.run_dir={run}", "checkpoint.every_steps=1",
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list((run / "checkpoints").glob("step-*[3-9]")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    os.kill(int(children[1]), signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 75, said
    step = json.loads((run / "exit.json").read_text(encoding="utf-8"))["step"]
    assert (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip() == f"step-{step:08d}"
