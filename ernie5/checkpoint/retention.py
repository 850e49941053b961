"""Which checkpoints stay on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.names import LATEST_FILE, MANIFEST_FILE, NATIVE_FOLDER, list_checkpoints, step_of

TEMPORARY_PREFIX = ".tmp-"
NATIVE_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")  # which DeepSpeed leaves beside its steps
REPLACED_PREFIX = f"{TEMPORARY_PREFIX}replaced-"


def checkpoints_to_remove(steps: list[int], *, newest: int, config: CheckpointConfig) -> list[int]:
    """Steps out of `steps` (ascending) that neither the newest `keep` nor `keep_every_steps` protect.

    `newest` is the step just saved. Later ones stem from before the run went back to an earlier checkpoint: they must
    not push out what was just saved, and stay until the run has come past them.
    """
    past = [step for step in steps if step <= newest]
    recent = set(past[-config.keep :])
    every = config.keep_every_steps
    return [step for step in past if step not in recent and not (every and step % every == 0)]


def apply_retention(folder: Path, *, newest: int, config: CheckpointConfig) -> list[Path]:
    """Remove surplus checkpoints after step `newest` was saved; returns the removed paths.

    A directory is renamed away first, so that a kill in between never leaves half a checkpoint under its name.
    """
    found = {step_of(path.name): path for path in list_checkpoints(folder)}
    removed = []
    for step in checkpoints_to_remove([step for step in found if step is not None], newest=newest, config=config):
        path = found[step]
        doomed = folder / f"{TEMPORARY_PREFIX}removed-{path.name}"
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        removed.append(path)
    return removed


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written. A checkpoint that was about to be replaced, and whose successor
    did not come to stand in its place, gets its name back."""
    if folder.is_dir():
        for path in folder.glob(f"{REPLACED_PREFIX}*"):
            target = folder / path.name.removeprefix(REPLACED_PREFIX)
            if not target.exists() and (path / MANIFEST_FILE).is_file():
                path.rename(target)
        for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(path, ignore_errors=True)


def clear_checkpoints(folder: Path) -> None:
    """Remove every checkpoint and `latest`, also DeepSpeed's beside them, and the folder if nothing else is in it:
    checkpoint.dir may be a place that holds other files of the user."""
    native = folder / NATIVE_FOLDER
    for name in NATIVE_SCRIPTS:
        (native / name).unlink(missing_ok=True)
    for place in (native, folder):
        remove_leftovers(place)
        for path in list_checkpoints(place):
            shutil.rmtree(path, ignore_errors=True)
        (place / LATEST_FILE).unlink(missing_ok=True)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
