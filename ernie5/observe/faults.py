"""Which exit code an exception means, in one place for the command line and for RUN_DIR/exit.json; torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from ernie5.errors import EXIT_BUG, EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EnvironmentFault, Ernie5Error

OUT_OF_MEMORY = "the machine is out of memory. Lower batch.micro_sequences, data.sequence_tokens or the model size"
DISK_FULL = "the disk is full. Free some space, then run the same command again"
FULL_BYTES = 1 << 20  # less room than this is a full disk
ENVIRONMENT_ERRNOS = {
    errno.ENOSPC: DISK_FULL,
    errno.EDQUOT: "the disk quota is used up. Free some space, then run the same command again",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows. Choose another place or raise it",
    errno.EACCES: "permission denied. Choose a place that you may write to, for example train.run_dir=runs/mine",
    errno.EPERM: "operation not permitted. Choose a place that you may write to, for example train.run_dir=runs/mine",
    errno.EROFS: "that file system is read-only. Choose another place, for example train.run_dir=runs/mine",
    errno.EIO: "input/output error. Check the disk",
    errno.ENOMEM: OUT_OF_MEMORY,
    errno.EMFILE: "too many open files. Raise the limit with `ulimit -n 65536`",
}
# Libraries wrap some of the machine's faults into RuntimeError or their own classes; the text is all they leave.
WRAPPED_FAULTS = (
    ("No space left on device", DISK_FULL),
    ("os error 28", DISK_FULL),
    ("os error 27", "a file is larger than the file system or `ulimit -f` allows. Choose another place or raise it"),
    ("EADDRINUSE", "the port where processes meet is in use, perhaps by another run. Choose one: --master_port N"),
    ("can't allocate memory", OUT_OF_MEMORY),
    ("CUDA out of memory", OUT_OF_MEMORY),
)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What an exception means: the exit code, and the one line `name: message` (empty for a bug)."""

    exit_code: int
    name: str
    message: str

    @property
    def is_bug(self) -> bool:
        """True when the traceback, not a message, is what helps."""
        return self.exit_code == EXIT_BUG

    def line(self) -> str:
        """`ClassName: message` on one line."""
        return f"{self.name}: {' '.join(self.message.split())}"


def classify(error: BaseException) -> Fault:
    """The Fault of an exception; everything unknown is a bug (exit code 1)."""
    if isinstance(error, Ernie5Error):
        return Fault(error.exit_code, type(error).__name__, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Fault(EXIT_INTERRUPTED, "Interrupted", "stopped by the user. The same command starts again or goes on.")
    if isinstance(error, MemoryError):
        return Fault(EXIT_ENVIRONMENT, "EnvironmentFault", f"{OUT_OF_MEMORY}.")
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRNOS:
        where = f"{error.filename}: " if error.filename else ""
        return Fault(EXIT_ENVIRONMENT, "EnvironmentFault", f"{where}{ENVIRONMENT_ERRNOS[error.errno]}.")
    for sign, message in WRAPPED_FAULTS:
        if sign in str(error):
            return Fault(EXIT_ENVIRONMENT, "EnvironmentFault", f"{message}.")
    return Fault(EXIT_BUG, type(error).__name__, str(error))


def save_traceback(error: BaseException, *, run_dir: Path) -> Path:
    """Write the traceback of `error` to a new file in RUN_DIR/errors/ and return its path."""
    folder = Path(run_dir) / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return path


@contextlib.contextmanager
def keep_tracebacks(run_dir: Path) -> Iterator[None]:
    """Let every exception pass; a bug's traceback is also saved, and a note in the exception says where. A full disk
    that names no file gets the run directory's name, where that disk is the full one."""
    try:
        yield
    except Exception as error:
        if classify(error).message.startswith(DISK_FULL) and _is_full(run_dir):
            raise EnvironmentFault(f"{run_dir}: {DISK_FULL}.") from error
        if classify(error).is_bug:
            with contextlib.suppress(OSError):  # a full disk must not hide the bug itself
                path = save_traceback(error, run_dir=run_dir)
                error.add_note(f"This is a bug of ernie5; the traceback is kept in {path}")
        raise


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False
