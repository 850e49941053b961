"""Which exit code an exception means, in one place for the command line and for RUN_DIR/exit.json; torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import time
import traceback
import types
from collections.abc import Iterator, Mapping
from pathlib import Path

from ernie5.errors import EXIT_BUG, EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EnvironmentFault, Ernie5Error

RUN_PLACE = "train.run_dir=runs/mine"
AGAIN = "then run the same command again"
DISK_FULL = "the disk is full"
FULL_BYTES = 1 << 20  # less room than this is a full disk
OUT_OF_MEMORY = ("the machine is out of memory", "Lower batch.micro_sequences, data.sequence_tokens or the model size")
# By what the system says: what happened, and the way out; {place} is an example of another place.
ENVIRONMENT_ERRNOS: Mapping[int, tuple[str, str]] = types.MappingProxyType({
    errno.ENOSPC: (DISK_FULL, f"Free some space, {AGAIN}"),
    errno.EDQUOT: ("the disk quota is used up", f"Free some space or ask for more, {AGAIN}"),
    errno.EFBIG: ("the file is larger than the file system or `ulimit -f` allows",
                  "Choose another place, for example {place}, or raise it"),
    errno.EACCES: ("permission denied", "Choose a place that you may write to, for example {place}"),
    errno.EPERM: ("operation not permitted", "Choose a place that you may write to, for example {place}"),
    errno.EROFS: ("that file system is read-only", "Choose another place, for example {place}"),
    errno.EIO: ("input/output error", "Check the disk"),
    errno.ENOMEM: OUT_OF_MEMORY,
    errno.EMFILE: ("too many open files", "Raise the limit with `ulimit -n 65536`"),
})
# Where it is not known whether something was read or written.
FORBIDDEN: Mapping[int, tuple[str, str]] = types.MappingProxyType({
    errno.EACCES: ("permission denied", "Name a place that you may read and write, or change its permissions"),
    errno.EPERM: ("operation not permitted", "Name a place that you may read and write, or change its permissions"),
})
# What means the machine only where something is being written: elsewhere the program asked for what is not there.
WRITING_ERRNOS: Mapping[int, tuple[str, str]] = types.MappingProxyType({
    errno.ENOENT: ("the folder is not there: it was removed, or is not mounted",
                   f"Bring it back or choose another place, for example {{place}}, {AGAIN}"),
    errno.ESTALE: ("the folder is gone from the server that it lies on",
                   f"Mount it again or choose another place, for example {{place}}, {AGAIN}"),
    errno.ENOTDIR: ("a file stands where a folder is needed", "Move it away or choose another place, such as {place}"),
    errno.EEXIST: ("a file stands where a folder is needed", "Move it away or choose another place, such as {place}"),
    errno.EISDIR: ("a folder stands where the file should", "Move it away or choose another place, such as {place}"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one, for example {place}"),
})
# Libraries wrap some of the machine's faults into RuntimeError or their own classes; the text is all they leave.
ERRNO_IN_TEXT = re.compile(r"(?:os error |Errno )(\d+)")
PORT_IN_USE = ("the port where processes meet is in use, perhaps by another run", "Choose one: --master_port N")
WRAPPED_FAULTS = (
    ("No space left on device", ENVIRONMENT_ERRNOS[errno.ENOSPC]),
    ("EADDRINUSE", PORT_IN_USE),
    ("can't allocate memory", OUT_OF_MEMORY),
    ("CUDA out of memory", OUT_OF_MEMORY),
)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why the machine did not write: what happened (with the file, where it is known), and the way out."""

    what: str
    way: str

    def __str__(self) -> str:
        return f"{self.what}. {self.way}"


def refusal_of(error: BaseException, *, place: str = RUN_PLACE) -> Refusal | None:
    """What `error` means where it ended a writing, None where it is none of the machine's: an OSError, one that a
    library hid behind its own (torch.save), or one that is left in a text alone (safetensors). place: an example of
    another place, as the user would write it."""
    found = _system_error(error)
    number = (found.errno if found is not None else None) or _number_in(str(error))
    if found is None and not number:
        return None
    what, way = (ENVIRONMENT_ERRNOS | WRITING_ERRNOS).get(
        number, (str(error), f"Look at the disk and at permissions, {AGAIN}")
    )
    file = (found.filename2 or found.filename) if found is not None and number else None
    file = os.fsdecode(file) if isinstance(file, bytes) else file
    return Refusal(f"{what} ({file})" if file else what, way.format(place=place))


def _system_error(error: BaseException | None) -> OSError | None:
    while isinstance(error, RuntimeError):  # what hides another one; a bug met on the way out of one stays a bug
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) else None


def _number_in(text: str) -> int:
    match = ERRNO_IN_TEXT.search(text)
    return int(match.group(1)) if match else errno.ENOSPC if "No space left on device" in text else 0


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
        return Fault(EXIT_ENVIRONMENT, "EnvironmentFault", f"{'. '.join(OUT_OF_MEMORY)}.")
    number = error.errno if isinstance(error, OSError) else _number_in(str(error))
    known = [(ENVIRONMENT_ERRNOS | FORBIDDEN)[number]] if number in ENVIRONMENT_ERRNOS else []
    known += [message for sign, message in WRAPPED_FAULTS if sign in str(error)]
    if known:
        file = error.filename if isinstance(error, OSError) else None
        message = ". ".join(known[0]).format(place=RUN_PLACE)
        return Fault(EXIT_ENVIRONMENT, "EnvironmentFault", f"{file}: {message}." if file else f"{message}.")
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
            raise EnvironmentFault(f"{run_dir}: {refusal_of(error)}.") from error
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
