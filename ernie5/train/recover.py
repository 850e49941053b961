"""How a run ends: signals that ask for a checkpoint, and exit.json for whoever watches. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
import types
from pathlib import Path

from ernie5.errors import EXIT_DONE
from ernie5.observe.faults import Fault

EXIT_FILE = "exit.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    """Content of exit.json: exit code, error class ("" when done), one-line message, last step, and the checkpoint
    that resumes the run ("" for none)."""

    exit_code: int
    error: str
    message: str
    step: int
    checkpoint: str


def done_record(*, step: int, checkpoint: str) -> ExitRecord:
    """The record of a run that reached its last step."""
    return ExitRecord(EXIT_DONE, "", "done", step, checkpoint)


def fault_record(fault: Fault, *, step: int, checkpoint: str) -> ExitRecord:
    """The record of a run that ended in an error."""
    return ExitRecord(fault.exit_code, fault.name, fault.message, step, checkpoint)


def write_exit(run_dir: Path, *, record: ExitRecord) -> None:
    """Write RUN_DIR/exit.json atomically; launchers blur exit codes, this file does not."""
    temporary = run_dir / f".{EXIT_FILE}.{os.getpid()}"
    text = json.dumps({**dataclasses.asdict(record), "unix_seconds": time.time()}, indent=1) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(run_dir / EXIT_FILE)


def clear_exit(run_dir: Path) -> None:
    """Remove the record of the previous start: a missing one means killed."""
    (run_dir / EXIT_FILE).unlink(missing_ok=True)
