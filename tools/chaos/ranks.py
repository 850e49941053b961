"""The ranks of a supervised run, seen from outside: who they are, what they are doing, and what is on disk."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

MARK = b"ERNIE5_CHAOS"


def find_ranks(mark: str) -> dict[int, int]:
    """Process id by rank, of the processes that inherited `mark` and that a launcher gave a rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            pairs = (pair.partition(b"=") for pair in (entry / "environ").read_bytes().split(b"\0"))
            environment = {name: value for name, _, value in pairs}
            is_python = b"pretrain.py" in (entry / "cmdline").read_bytes()
            if environment.get(MARK) == mark.encode() and b"RANK" in environment and is_python:
                found[int(environment[b"RANK"])] = int(entry.name)
    return found


def last_step(run_dir: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 before the first."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run_dir / "metrics.jsonl").read_text("utf-8").splitlines()[-1])["step"])
    return 0


def saved_step(run_dir: Path) -> int:
    """The newest complete checkpoint on disk; 0 where there is none."""
    steps = [int(path.parent.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/step-*/manifest.json")]
    return max(steps, default=0)


def is_saving(run_dir: Path) -> bool:
    """True while a checkpoint is being written."""
    return any(run_dir.glob("checkpoints/.tmp-step-*"))


def resumed_steps(run_dir: Path) -> list[int]:
    """The step that each start of the run went on from, in order, as its log says."""
    path = run_dir / "log.txt"
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    return [int(line.rsplit(" ", 1)[1]) for line in lines if "INFO resumed from" in line]
