"""Writing behind the training: one job at a time in a thread, whose error waits until somebody asks for it.

Values in CPU memory are in the file before the job starts (`tensor_file.begin_tensor_file`); those on a GPU were
copied into CPU memory, and the job writes them. A thread, not a process: it sees that copy as it is, no CUDA context
is forked, and writing, hashing and synchronising release the interpreter. A killed process takes its thread along,
which is what atomic saving is for.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from pathlib import Path


class SaveStatus(enum.IntEnum):
    """How the save in flight stands. Ranks add theirs up: those that publish say DONE, and no number of them is as much
    as one FAILED."""

    RUNNING = 0
    DONE = 1
    FAILED = 1 << 20


class BackgroundWriter:
    """At most one job in flight. seconds: what the last finished job took; error: what it ended in."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._path: Path | None = None
        self.error: Exception | None = None
        self.seconds = 0.0

    def start(self, job: Callable[[], Path]) -> None:
        """Run `job` in the background. Raises RuntimeError while another one runs: the caller must wait first."""
        if self._thread is not None and self._thread.is_alive():
            raise RuntimeError("a checkpoint is still being written")
        self._path = self.error = None
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def status(self, *, wait: bool) -> SaveStatus:
        """How the last job stands, after its end if `wait`."""
        if self._thread is not None and (wait or not self._thread.is_alive()):
            self._thread.join()
        elif self._thread is not None:
            return SaveStatus.RUNNING
        return SaveStatus.DONE if self.error is None else SaveStatus.FAILED

    def result(self) -> Path:
        """What the last job returned, or raise what it raised."""
        self.status(wait=True)
        if self.error is not None:
            raise self.error
        if self._path is None:
            raise RuntimeError("no checkpoint was written")
        return self._path

    def _run(self, job: Callable[[], Path]) -> None:
        started = time.perf_counter()
        try:
            self._path = job()
        except Exception as error:  # handed to whoever asks for the result, in the thread of the training
            self.error = error
        self.seconds = time.perf_counter() - started
