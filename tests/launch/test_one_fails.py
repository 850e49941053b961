"""A rank that fails takes all ranks down within seconds, with one message, whoever launched them.

torchrun and DeepSpeed's launcher notice a killed rank first, say so themselves and end the others before these speak.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_SECONDS = 500
DOWN_SECONDS = 25.0  # three until a cause is given up, three to leave it the word; the rest is a busy machine


def command_of(launcher: str, *, repository: Path) -> list[str]:
    """What starts two ranks of pretrain.py here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = str(repository / "launch" / "pretrain.py")
    bins = Path(sys.executable).parent
    return {
        "spawn": [sys.executable, str(repository / "launch" / "spawn.py"), "2"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port,
                     script],
        "deepspeed": [str(bins / "deepspeed"), "--num_gpus", "2", "--master_port", port, script],
    }[launcher]


def ranks_of(run: Path) -> dict[int, int]:
    """Process id by rank of the run in `run`."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        rank = next((value for value in variables if value.startswith(b"RANK=")), None)
        is_script = any(word.endswith(b"pretrain.py") for word in words[:3])
        if rank and is_script and b"train.run_dir=%s" % bytes(run) in words:
            found[int(rank.removeprefix(b"RANK="))] = int(entry.name)
    return found


def wait_until(condition: object, *, process: subprocess.Popen) -> object:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.fixture
def launch(repository: Path, tmp_path: Path) -> Iterator[object]:
    """launch(launcher, settings) starts two ranks with the run directory tmp_path/run; what they say goes to `said`."""
    started = []

    def start(launcher: str, *settings: str) -> subprocess.Popen:
        with (tmp_path / "said").open("wb") as said:
            started.append(subprocess.Popen(
                [*command_of(launcher, repository=repository), str(repository / "tools" / "chaos" / "chaos.yaml"),
                 f"train.run_dir={tmp_path / 'run'}", "data.streams=2", "batch.global_sequences=2", *settings],
                stdout=said, stderr=said, cwd=tmp_path, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                     "RANK_LOGS": str(tmp_path / "logs")},
            ))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


def messages(tmp_path: Path) -> list[str]:
    """Lines of ours that name an error; launchers add their own."""
    lines = (tmp_path / "said").read_text("utf-8", errors="replace").splitlines()
    return [line for line in lines if line.startswith(("PeerError", "ConfigError", "LayoutError", "rank "))]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ranks are found in /proc")
@pytest.mark.parametrize("launcher", ["spawn", "torchrun", "deepspeed"])
def test_a_killed_rank_takes_the_others_down_and_one_of_them_says_who(launcher, launch, tmp_path: Path) -> None:
    process = launch(launcher, "train.steps=5000", "checkpoint.every_steps=0")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text("utf-8").count("\n") >= 2, process=process)
    ranks = ranks_of(tmp_path / "run")
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    started = time.monotonic()
    wait_until(lambda: not ranks_of(tmp_path / "run") or None, process=process) if process.poll() is None else None
    assert time.monotonic() - started < DOWN_SECONDS
    assert process.wait(timeout=60) != 0
    said = messages(tmp_path)
    peer = [line for line in said if line.startswith("PeerError")]
    assert len(peer) <= 1 and len(said) <= 2 and (peer or launcher != "spawn"), said
    assert all("rank 1 on" in line and "has ended" in line and " over ranks 0-1 in ernie5/" in line for line in peer)
    assert all("There is no checkpoint yet" in line for line in peer), "checkpoint.every_steps=0 saves at the end alone"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_what_every_rank_would_refuse_is_said_once(launcher, launch, tmp_path: Path) -> None:
    process = launch(launcher, "parallel.ep=3")
    assert process.wait(timeout=PATIENCE_SECONDS) != 0
    assert len(messages(tmp_path)) == 1, messages(tmp_path)
    assert "does not divide" in messages(tmp_path)[0]
