"""The run directory: held by one run at a time, cleared of what a run writes, its checkpoints' place tried."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
import typing
from collections.abc import Iterator
from pathlib import Path

from ernie5.checkpoint.names import latest_checkpoint
from ernie5.checkpoint.places import METRICS_FILE, owner_of
from ernie5.checkpoint.retention import clear_checkpoints
from ernie5.errors import ConfigError, EnvironmentFault
from ernie5.observe.faults import refusal_of
from ernie5.observe.log import get_log
from ernie5.observe.watchdog import MARKER
from ernie5.train.config import RootConfig
from ernie5.train.recover import RUN_DIR_VARIABLE

CONFIG_FILE = "config.yaml"
RUN_FILES = (METRICS_FILE, "routing.jsonl", "evaluation.json", "report.html", CONFIG_FILE)
# In its folders, by name, too: a run directory may be a project's folder, with errors/ and samples/ of its own.
GALLERY = "samples.json"  # generate/manifest.py's, which loads torch: what stands beside it goes with it
RUN_PATTERNS = (
    "tensorboard/events.out.tfevents.*", f"samples/*/{GALLERY}", "samples/step-[0-9]*",
    "errors/hang-*-rank*.txt", f"errors/{MARKER}", "errors/[0-9]*-[0-9]*-[0-9]*.txt",
)
LOCK_FILE = ".train.lock"  # launch/supervise.py has its own: an agent and its ranks hold the directory together
ENDING_SECONDS = 3.0  # until a process that was killed is gone
LEASE_SECONDS = 120.0  # until shared storage gives up on a machine that is gone
POLL_SECONDS = 0.1
KEY = "checkpoint.dir"


@contextlib.contextmanager
def held(run_dir: Path, *, key: str = "train.run_dir") -> Iterator[None]:
    """Hold RUN_DIR, or the folder of `key`, against a second run for as long as this process lives, and no longer: the
    kernel lets go.

    A start that comes in place of one that was lost waits for that one's end. Where the storage knows no locks, nothing
    is held. Raises ConfigError where another run goes on there.
    """
    with contextlib.ExitStack() as files:
        with contextlib.suppress(OSError):  # whatever the run writes next says it better
            _lock(files.enter_context(_open(run_dir / LOCK_FILE)).fileno(), folder=run_dir, key=key)
        yield


def _open(path: Path) -> typing.IO:
    try:
        return path.open("a")
    except PermissionError:
        return path.open("rb")  # another user's file shows whether that one's run holds it, all the same


def _lock(number: int, *, folder: Path, key: str) -> None:
    seconds = LEASE_SECONDS if _is_restart() else ENDING_SECONDS
    deadline, told = time.monotonic() + seconds, seconds == ENDING_SECONDS
    while _is_locked(number):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{key} = {folder}: another run goes on there. It takes one run at a time. Give this one another "
                f"{key}, or wait until that one has ended"
            )
        if not told:
            told = True
            get_log().warning("%s: another run has not ended there yet; waiting up to %.0f s for it", folder, seconds)
        time.sleep(POLL_SECONDS)


def _is_restart() -> bool:
    """Whether an agent has started this process, which ends the ranks before it first: of its own host."""
    return RUN_DIR_VARIABLE in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _is_locked(number: int) -> bool:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def clear_run(run_dir: Path, *, folder: Path) -> None:
    """Remove what a run writes, by name, and its checkpoints in `folder`; other files of the user stay."""
    for name in RUN_FILES:
        (run_dir / name).unlink(missing_ok=True)
    for place in {folder, run_dir / "checkpoints"}:
        clear_checkpoints(place)
    for pattern in RUN_PATTERNS:
        for path in run_dir.glob(pattern):
            path = path.parent if path.name == GALLERY else path
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for name in {pattern.split("/")[0] for pattern in RUN_PATTERNS}:
        with contextlib.suppress(OSError):  # not there, or the user's files are in it
            (run_dir / name).rmdir()


@contextlib.contextmanager
def held_folder(config: RootConfig, *, run_dir: Path, folder: Path) -> Iterator[None]:
    """Hold `folder`, where the checkpoints of RUN_DIR will lie, against other runs; a folder that gets none is not left
    behind. Raises ConfigError where a file is in the way or it is another run's, EnvironmentFault where the machine
    refuses: else the first save would find it out."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        _try_to_write(config, folder=folder)
        is_apart = config.checkpoint.dir is not None and not folder.samefile(run_dir)  # else RUN_DIR's lock is its own
        with held(folder, key=KEY) if is_apart else contextlib.nullcontext():
            _check_owner(config, run_dir=run_dir, folder=folder)
            try:
                yield
            finally:
                if [path.name for path in folder.glob("*")] == [LOCK_FILE]:
                    (folder / LOCK_FILE).unlink(missing_ok=True)
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _try_to_write(config: RootConfig, *, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        config.fail(KEY, f"a file stands in the place of {folder}. Name another directory or move the file away")
    except OSError as error:
        refusal = refusal_of(error, place=f"{KEY}=DIR")
        raise EnvironmentFault(f"checkpoints cannot be saved to {folder}: {refusal}.") from error


def _check_owner(config: RootConfig, *, run_dir: Path, folder: Path) -> None:
    """One run's checkpoints would be taken for the other's: gone on from, thinned out, cleared by --fresh."""
    owner = owner_of(folder, newest=latest_checkpoint(folder))
    if owner is not None and not owner.samefile(run_dir):
        config.fail(
            KEY, f"{folder} has the checkpoints of the run in {owner}. Give this run another {KEY}, with --resume "
            f"{folder} where it is to go on from them. If that run goes on in {run_dir}, remove {owner / CONFIG_FILE}"
        )
