"""Faults of one rank of two, in a real run: NaN in its gradient, then a hang; and a disk that is full while saving."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE_SECONDS = 300


def start_ranks(repository: Path, run_dir: Path, *, faults: str, settings: tuple[str, ...]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "FAULTS": faults}
    command = [sys.executable, str(Path(__file__).with_name("faulty_rank.py")),
               str(repository / "tools" / "chaos" / "chaos.yaml"), f"train.run_dir={run_dir}", *settings]
    return [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                             stderr=subprocess.PIPE) for rank in range(2)]


def test_nan_on_one_rank_is_rolled_back_on_both_and_a_hang_ends_with_the_stacks_of_both(
    repository: Path, tmp_path: Path
) -> None:
    ranks = start_ranks(repository, tmp_path, faults="1 4 8", settings=(
        "train.steps=20", "data.streams=2", "batch.global_sequences=2", "checkpoint.every_steps=2",
        "observe.alarms.on_nan=rollback", "train.hang_seconds=6",
    ))
    said = [rank.communicate(timeout=PATIENCE_SECONDS)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [5, 5], said
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert "not finite. Back to" in log and "the data of steps 3 to 4 are left out" in log
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [(row["step"], row["skipped"]) for row in rows] == [(step, 0) for step in range(1, 6)]
    stacks = {path.name.rsplit("-", 1)[1]: path.read_text("utf-8") for path in (tmp_path / "errors").glob("hang-*")}
    assert set(stacks) == {"rank0.txt", "rank1.txt"}
    assert "faulty_rank.py" in stacks["rank1.txt"] and "in next_step" in stacks["rank1.txt"]
    assert "in all_reduce" in stacks["rank0.txt"]
    record = json.loads((tmp_path / "exit.json").read_text("utf-8"))
    assert record["exit_code"] == 5 and "process hangs" in record["message"]
    assert "it goes on from its newest checkpoint, or from the beginning where there is none" in record["message"]
    assert record["step"] == 5 and record["checkpoint"].endswith("step-00000004")


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_file_limit_met_while_saving_ends_with_3_and_leaves_the_previous_checkpoint(
    asynchronous: str, start_train: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    """The limit is set on the running process, once its first checkpoint stands: from then on no file may grow past
    100 kB, which metrics.jsonl does not reach and the tensors exceed."""
    process = start_train("full", "train.steps=2000", "checkpoint.every_steps=3", "observe.log_every_steps=1000",
                          "train.eval_every_steps=0", f"checkpoint.asynchronous={asynchronous}")
    first = tmp_path / "full" / "checkpoints" / "latest"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 3, said
    record = json.loads((tmp_path / "full" / "exit.json").read_text("utf-8"))
    stands = record["checkpoint"]
    assert record["error"] == "EnvironmentFault" and f"The previous checkpoint stands: {stands}" in said
    assert not list((tmp_path / "full" / "checkpoints").glob(".tmp-*"))
    step = int(stands.rsplit("-", 1)[1])
    again = start_train("full", f"train.steps={step + 1}")
    _, said = again.communicate(timeout=PATIENCE_SECONDS)
    assert again.returncode == 0 and f"resumed from {stands}" in said, said
