"""What each rank does in the tests of hosts' parts: four ranks as two hosts, which share no folder."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.names import list_checkpoints
from ernie5.checkpoint.saver import Saver
from ernie5.checkpoint.writer import SaveStatus
from ernie5.engine.interface import Engine
from ernie5.train.neighbours import HostRanks, find_common

SPEC = importlib.util.spec_from_file_location("rank_job", Path(__file__).parents[1] / "checkpoint" / "rank_job.py")
JOB = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(JOB)


def save_part(engine: Engine, *, folder: Path, step: int) -> SaveStatus:
    """The part of this rank's host, spoilt as soon as training might go on."""
    hosts = HostRanks(engine, folder=folder)
    saver = Saver(folder, config=CheckpointConfig(keep=2), engine=hosts, publishers=hosts.num_hosts)
    saver.start(hosts.part(JOB.contents_of(engine, step=step)), behind=True)
    status = saver.settle(wait=True)
    saver.result()
    return status


def through_memory(work: str, layouts: list[dict]) -> list[dict]:
    """For each layout: save parts of two steps, find the newest in another engine, load it; then spoil them."""
    results = []
    for number, layout in enumerate(layouts):
        engine = JOB.make_engine(layout)
        host = engine.rank // 2
        folder = Path(work) / f"layout-{number}" / f"host-{host}"
        JOB.train(engine, seed=3)
        status = [save_part(engine, folder=folder, step=step) for step in (1, 2)]
        saved = [part.values.clone() for part in engine.slices()]
        other = JOB.make_engine(layout, seed=8)
        found = find_common(folder, disk_step=1, engine=other)
        other.load_state(found.engine)
        same = all(torch.equal(a, part.values) for a, part in zip(saved, other.slices(), strict=True))
        result = {"done": [one == SaveStatus.DONE for one in status], "same": same, "step": found.run.step,
                  "disk": find_common(folder, disk_step=2, engine=other) is None,
                  "elsewhere": find_common(folder if host else None, disk_step=0, engine=other) is None}
        second = JOB.make_engine(layouts[number - 1], seed=8)
        result["layout"] = find_common(folder, disk_step=0, engine=second) is None
        if host:
            save_part_alone(folder, step=2)
        engine.total(0.0)
        older = find_common(folder, disk_step=0, engine=other)  # step 2 is of two histories now
        result["history"] = older.run.step
        if engine.rank == 0:
            file = next((folder / "step-00000001").glob("optimizer*"))
            file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
        engine.total(0.0)
        result["damaged"] = find_common(folder, disk_step=0, engine=other) is None
        result["steps"] = [path.name for path in list_checkpoints(folder)]
        results.append(result)
    return results


def save_part_alone(folder: Path, *, step: int) -> None:
    """Give this host's part another name, as one that was saved again after the run went back."""
    path = folder / f"step-{step:08d}" / "manifest.json"
    text = path.read_text(encoding="utf-8")
    if '"part_of": "again' not in text:
        new = path.with_name(f"manifest-{os.getpid()}")  # the host's other rank reads the same file meanwhile
        new.write_text(text.replace('"part_of": "', '"part_of": "again-'), encoding="utf-8")
        new.replace(path)
