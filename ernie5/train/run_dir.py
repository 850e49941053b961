"""The run directory: held by one run at a time, cleared of what a run writes, its checkpoints' place tried."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ernie5.checkpoint.retention import clear_checkpoints
from ernie5.errors import ConfigError, EnvironmentFault
from ernie5.observe.faults import refusal_of
from ernie5.observe.log import get_log
from ernie5.observe.watchdog import MARKER
from ernie5.train.config import RootConfig
from ernie5.train.recover import RUN_DIR_VARIABLE

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
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


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold RUN_DIR against a second run for as long as this process lives, and no longer: the kernel lets go.

    A start that comes in place of one that was lost waits for that one's end. Where the storage knows no locks, nothing
    is held. Raises ConfigError where another run goes on there.
    """
    with contextlib.ExitStack() as files:
        with contextlib.suppress(OSError):  # whatever the run writes next says it better
            _lock(files.enter_context((run_dir / LOCK_FILE).open("a")).fileno(), run_dir=run_dir)
        yield


def _lock(number: int, *, run_dir: Path) -> None:
    seconds = LEASE_SECONDS if _is_restart() else ENDING_SECONDS
    deadline, told = time.monotonic() + seconds, seconds == ENDING_SECONDS
    while _is_locked(number):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"train.run_dir = {run_dir}: another run goes on there. A run directory takes one run at a time. Give "
                "this one another train.run_dir, or wait until that one has ended"
            )
        if not told:
            told = True
            get_log().warning("%s: another run has not ended there yet; waiting up to %.0f s for it", run_dir, seconds)
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


def check_folder(config: RootConfig, *, folder: Path) -> None:
    """Write into `folder`, where checkpoints will lie, and take all of it back. Raises ConfigError where a file is in
    the way, EnvironmentFault where the machine refuses: else the first save would find it out."""
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        config.fail(
            "checkpoint.dir", f"a file stands in the place of {folder}. Name another directory or move the file away"
        )
    except OSError as error:
        refusal = refusal_of(error, place="checkpoint.dir=DIR")
        raise EnvironmentFault(f"checkpoints cannot be saved to {folder}: {refusal}.") from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
