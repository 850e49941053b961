"""How a run ends: signals that ask for a checkpoint, and exit.json for whoever watches. Torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
import types
import typing
from pathlib import Path

from ernie5.checkpoint.names import latest_checkpoint, step_of
from ernie5.checkpoint.places import checkpoint_folders
from ernie5.errors import EXIT_DONE, EXIT_PEER, Ernie5Error
from ernie5.observe.faults import Fault, classify

if typing.TYPE_CHECKING:
    from ernie5.train.state import Progression

EXIT_FILE = "exit.json"
RUN_DIR_VARIABLE = "ERNIE5_RUN_DIR"  # launch/supervise.py tells its ranks which run directory it looks at
SIGNALS = (signal.SIGINT, signal.SIGTERM)
CAUSE_SECONDS = 3.0  # until the rank that was the cause has written exit.json, and until it has spoken
POLL_SECONDS = 0.1


class StopRequest:
    """Remembers the first SIGINT or SIGTERM, so that the loop can finish its step and save.

    A second SIGINT acts as Python's default (KeyboardInterrupt at once), for a person who does not want to wait.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """True once a signal has arrived on this process."""
        return bool(self.name)

    def _receive(self, number: int, frame: types.FrameType | None) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@dataclasses.dataclass(frozen=True)
class ExitRecord:
    """Content of exit.json: exit code, error class ("" when done), one-line message, last step, the checkpoint that
    resumes the run ("" for none), and the rank that wrote it."""

    exit_code: int
    error: str
    message: str
    step: int
    checkpoint: str
    rank: int = 0


@dataclasses.dataclass
class Standing:
    """Where a run stands: at its last step, and before it has begun at that of the newest checkpoint in `folder`."""

    folder: Path
    progression: Progression | None = None

    def done(self) -> ExitRecord:
        """The record of a run that reached its last step."""
        step, checkpoint = self._look()
        return ExitRecord(EXIT_DONE, "", "done", step, checkpoint)

    def fault(self, fault: Fault, *, rank: int) -> ExitRecord:
        """The record of a rank that ended in an error."""
        step, checkpoint = self._look()
        return ExitRecord(fault.exit_code, fault.name, fault.message, step, checkpoint, rank)

    def _look(self) -> tuple[int, str]:
        newest = latest_checkpoint(self.folder)
        if self.progression is not None:
            return self.progression.step, str(newest or "")
        return (0, "") if newest is None else (step_of(newest.name) or 0, str(newest))


def refusal_record(error: Ernie5Error, *, run_dir: Path) -> ExitRecord:
    """The record of a start that rank 0 refused: the run in `run_dir` stands where it stood."""
    folders = checkpoint_folders(run_dir)
    kept = next((folder for folder in folders if latest_checkpoint(folder) is not None), run_dir)
    return Standing(kept).fault(classify(error), rank=0)


def write_exit(run_dir: Path, *, record: ExitRecord, replace: bool = True) -> bool:
    """Write RUN_DIR/exit.json atomically; launchers blur exit codes, this file does not. Returns False where one
    stands that was not to be replaced."""
    text = json.dumps({**dataclasses.asdict(record), "unix_seconds": time.time()}, indent=1) + "\n"
    if not replace:
        try:
            with (run_dir / EXIT_FILE).open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True
    temporary = run_dir / f".{EXIT_FILE}.{socket.gethostname()}.{os.getpid()}"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(run_dir / EXIT_FILE)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return True


def leave_refusal(error: Ernie5Error) -> None:
    """Tell the agent, where there is one, that this command line is refused: no settings, hence no run directory, are
    known yet, and a launcher may end with another code."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    if folder and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            write_exit(Path(folder), record=refusal_record(error, run_dir=Path(folder)))


def read_exit(run_dir: Path) -> ExitRecord | None:
    """What RUN_DIR/exit.json says; None where there is none."""
    try:
        found = json.loads((run_dir / EXIT_FILE).read_text(encoding="utf-8"))
        return ExitRecord(**{field.name: found[field.name] for field in dataclasses.fields(ExitRecord)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def leave_exit(run_dir: Path, *, record: ExitRecord) -> bool:
    """Leave `record` in exit.json unless another rank's tells more; returns whether this rank is the one to speak.

    One cause, one message. A rank that only misses another one waits for that one's record and leaves the word to it,
    and lives on for a moment, for launchers kill all ranks as soon as one has ended. Of ranks that met the same error,
    rank 0 speaks, and so does a rank whose disk takes no record: that must not hide what ended the run.
    """
    try:
        return _leave_in_turn(run_dir, record=record)
    except OSError:
        return True


def _leave_in_turn(run_dir: Path, *, record: ExitRecord) -> bool:
    if record.exit_code == EXIT_PEER:
        cause = _await_exit(run_dir, seconds=CAUSE_SECONDS if record.rank == 0 else 2 * CAUSE_SECONDS)
        if cause is None:
            return write_exit(run_dir, record=record, replace=False)
        time.sleep(CAUSE_SECONDS)
        return record.rank == 0 and cause.exit_code == EXIT_PEER
    standing = read_exit(run_dir)
    if record.rank == 0 or standing is None or standing.exit_code == EXIT_PEER:
        write_exit(run_dir, record=record)
    return record.rank == 0 or _await_exit(run_dir, seconds=CAUSE_SECONDS / 2, same=record) is None


def await_turn() -> None:
    """Wait, on other ranks than 0, before an error that all ranks meet is raised: launchers end the other ranks as soon
    as one has ended, so that it is said once."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(CAUSE_SECONDS if os.environ.get("LOCAL_RANK") == "0" else 2 * CAUSE_SECONDS)


def _await_exit(run_dir: Path, *, seconds: float, same: ExitRecord | None = None) -> ExitRecord | None:
    """The record that stands, or comes within `seconds`; with `same`: rank 0's with the same exit code alone."""
    deadline = time.monotonic() + seconds
    while True:
        found = read_exit(run_dir)
        if found is not None and (same is None or (found.rank, found.exit_code) == (0, same.exit_code)):
            return found
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_SECONDS)


def clear_exit(run_dir: Path) -> None:
    """Remove the record of the previous start: a missing one means killed."""
    (run_dir / EXIT_FILE).unlink(missing_ok=True)
