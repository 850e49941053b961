"""Which checkpoints stay on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.names import list_checkpoints, step_of

TEMPORARY_PREFIX = ".tmp-"


def checkpoints_to_remove(steps: list[int], *, config: CheckpointConfig) -> list[int]:
    """Steps out of `steps` (ascending) that neither the newest `keep` nor `keep_every_steps` protect."""
    recent = set(steps[-config.keep :])
    every = config.keep_every_steps
    return [step for step in steps if step not in recent and not (every and step % every == 0)]


def apply_retention(folder: Path, *, config: CheckpointConfig) -> list[Path]:
    """Remove surplus checkpoints; returns the removed paths.

    A directory is renamed away first, so that a kill in between never leaves half a checkpoint under its name.
    """
    found = {step_of(path.name): path for path in list_checkpoints(folder)}
    removed = []
    for step in checkpoints_to_remove([step for step in found if step is not None], config=config):
        path = found[step]
        doomed = folder / f"{TEMPORARY_PREFIX}removed-{path.name}"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(path)
    return removed


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written."""
    if folder.is_dir():
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)
