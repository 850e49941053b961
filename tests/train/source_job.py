"""What each rank does in the test of ranks that see other checkpoints: two ranks and two steps on disk."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ernie5.checkpoint.load import check_together, open_run
from ernie5.checkpoint.names import list_checkpoints
from ernie5.errors import Ernie5Error
from ernie5.train.replica import agree

SPEC = importlib.util.spec_from_file_location("rank_job", Path(__file__).parents[1] / "checkpoint" / "rank_job.py")
JOB = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(JOB)


def go_back(work: str) -> tuple[str, str]:
    """Save steps 1 and 2; a rank's list of the folder lacks the newer one: what it says when it goes back there."""
    engine = JOB.make_engine({})
    folder = Path(work)
    for step in (1, 2):
        JOB.save(engine, folder=folder, step=step)
    loaded = open_run(list_checkpoints(folder)[-1 - engine.rank])
    try:
        check_together(loaded.directory, manifest=loaded.manifest, engine=engine)
    except Ernie5Error as error:
        return type(error).__name__, str(error)
    return "", ""


def resume(work: str, seen: list[int]) -> tuple[str, str]:
    """Save steps 1 and 2; each rank then resumes from the one that it sees, 0 for none: what it says, or its step."""
    engine = JOB.make_engine({})
    folder = Path(work)
    for step in (1, 2):
        JOB.save(engine, folder=folder, step=step)
    step = seen[engine.rank]
    source = list_checkpoints(folder)[step - 1] if step else None
    try:
        loaded = agree(open_run(source) if source is not None else None, source=source, engine=engine)
    except Ernie5Error as error:
        return type(error).__name__, str(error)
    engine.total(0.0)  # as whatever comes next
    return "", str(None if loaded is None else loaded.run.step)
