"""Runs of the multi-node proof: started by DeepSpeed's own launcher from node0, or on this machine alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hosts import Cluster

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 1800.0
CLOCK_FIGURES = ("tokens_per_second", "mfu", "step_seconds", "data_seconds", "save/stall_seconds")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout on hosts: slots[i] ranks on node i; settings: `a.b=c` of the run; tolerance: of its figures."""

    name: str
    slots: tuple[int, ...]
    settings: tuple[str, ...]
    tolerance: float = 0.0


def start_on_hosts(
    cluster: Cluster, *, case: Case, run_dir: Path, script: str = "pretrain.py", settings: Sequence[str] = ()
) -> subprocess.Popen:
    """`deepspeed --hostfile ...` on node0, in `run_dir`'s parent; each rank's output goes to RUN_DIR/ranks/."""
    folder = run_dir.parent
    slots = [f"{host.name} slots={count}" for host, count in zip(cluster.hosts, case.slots, strict=False)]
    (folder / "hostfile").write_text("\n".join(slots) + "\n", encoding="utf-8")
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n", encoding="utf-8")
    command = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", "hostfile",
               "--enable_each_rank_log", str(run_dir / "ranks"), str(ROOT / "launch" / script),
               *arguments(case, run_dir=run_dir, settings=settings)]
    with (folder / f"{run_dir.name}.launcher.log").open("ab") as log:
        return subprocess.Popen(
            cluster.hosts[0].command(command, folder=folder), stdout=log, stderr=log, env=environment()
        )


def start_agents(
    cluster: Cluster, *, case: Case, run_dir: Path, settings: Sequence[str]
) -> list[subprocess.Popen]:
    """An agent on every host."""
    if len(set(case.slots)) > 1:
        raise RuntimeError(f"torchrun starts the same number of ranks on every host, and {case.name} has {case.slots}")
    run_dir.mkdir(parents=True)
    return [start_agent(cluster, index=index, case=case, run_dir=run_dir, settings=settings)
            for index in range(len(case.slots))]


def start_agent(
    cluster: Cluster, *, index: int, case: Case, run_dir: Path, settings: Sequence[str]
) -> subprocess.Popen:
    """launch/supervise.py on a host, around that host's share of launch/torchrun.sh; started by hand, no ssh."""
    host = cluster.hosts[index]
    variables = [f"NODES={len(case.slots)}", f"NODE_RANK={index}", f"HEAD={cluster.hosts[0].name}",
                 f"PYTHON={sys.executable}", f"PROCESSES={case.slots[index]}"]
    command = ["env", *variables, sys.executable, str(ROOT / "launch" / "supervise.py"), "--run-dir", str(run_dir),
               "--", "bash", str(ROOT / "launch" / "torchrun.sh"), *arguments(case, run_dir=run_dir, settings=settings)]
    with (run_dir.parent / f"{run_dir.name}.{host.name}.log").open("ab") as log:
        return subprocess.Popen(host.command(command, folder=run_dir.parent), stdout=log, stderr=log, env=environment())


def run_here(case: Case, *, run_dir: Path) -> None:
    """The same ranks on this machine, by launch/spawn.py. Raises RuntimeError if the run does not end with 0."""
    command = [sys.executable, str(ROOT / "launch" / "spawn.py"), str(sum(case.slots)),
               *arguments(case, run_dir=run_dir, settings=())]
    run_dir.mkdir(parents=True)
    with (run_dir.parent / f"{run_dir.name}.launcher.log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"the run on one host ended with {done.returncode}; see {run_dir}.launcher.log")


def arguments(case: Case, *, run_dir: Path, settings: Sequence[str]) -> list[str]:
    """The command line of `ernie5 train` for this case."""
    config = ROOT / "configs" / "pretrain" / "debug.yaml"
    return [str(config), f"train.run_dir={run_dir}", "engine.cpu_threads=1", *case.settings, *settings]


def environment() -> dict[str, str]:
    """One thread per rank, so that two hosts on two cores do not fight."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def largest_difference(run_dir: Path, *, whole: Path) -> float:
    """Over all steps and figures that do not depend on the clock. Raises ValueError unless both have the same steps."""
    rows, expected = read_metrics(run_dir), read_metrics(whole)
    if [row["step"] for row in rows] != [row["step"] for row in expected] or not rows:
        raise ValueError(f"{run_dir} has steps {[row['step'] for row in rows]}, {whole} has {len(expected)} steps")
    largest = 0.0
    for row, other in zip(rows, expected, strict=True):
        for name in row.keys() - set(CLOCK_FIGURES):
            if (row[name] is None) != (other[name] is None):
                raise ValueError(f"step {row['step']}: {name} is {row[name]}, not {other[name]}")
            largest = max(largest, abs((row[name] or 0.0) - (other[name] or 0.0)))
    return largest


def read_metrics(run_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def wait_for_step(run_dir: Path, *, step: int, launcher: subprocess.Popen) -> None:
    """Until metrics.jsonl has that step. Raises RuntimeError if the launcher ends before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(row["step"] >= step for row in read_metrics(run_dir)):
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{run_dir} did not reach step {step}; see {run_dir}.launcher.log")
        time.sleep(POLL_SECONDS)


def messages_of(run_dir: Path) -> dict[str, list[str]]:
    """What each rank said at its end, from the logs that DeepSpeed's launcher keeps: lines with an error's name."""
    found = {}
    for path in sorted((run_dir / "ranks").glob("*_rank*.log")):
        lines = [line for line in path.read_text("utf-8", errors="replace").splitlines() if "Error: " in line]
        found[path.stem.rpartition("_")[2]] = lines
    return found


def fresh(folder: Path) -> Path:
    """`folder`, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
