"""Never a silent hang: where no step ends for too long, every rank writes down where it stands and ends with code 5.

A thread watches each rank. The first that has waited too long leaves a marker in RUN_DIR/errors, on whose sight the
watchdogs of the other ranks write their stacks too, wherever in a step they wait; a grace period later all of them end
their process. Where a library holds the interpreter, no thread of ours runs: then faulthandler's own timer, which the
watchdog pushes back as long as it lives, writes the stacks to stderr and ends the process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

from ernie5.errors import EXIT_PEER

MARKER = "hang"
START_SECONDS = 1800.0  # until the first step: rendezvous, loading, the kernels' first compilation
GRACE_SECONDS = 10.0
STARVED_SECONDS = 120.0


class Watchdog:
    """Ends the process with exit code 5 when `beat` has not been called for `limit_seconds`; 0 switches it off.

    report: called with one line before the end, by every rank, to write exit.json.
    """

    def __init__(self, run_dir: Path, *, rank: int, limit_seconds: float, report: Callable[[str], None]) -> None:
        self._folder, self._rank, self._limit, self._report = run_dir / "errors", rank, limit_seconds, report
        self._allowed = max(limit_seconds, START_SECONDS)
        self._beat, self._started = time.monotonic(), time.time()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._beat, self._started = time.monotonic(), time.time()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """A step has ended."""
        self._beat, self._allowed = time.monotonic(), self._limit

    def _watch(self) -> None:
        pause = min(1.0, self._limit / 4)
        while not self._ended.wait(pause):
            faulthandler.dump_traceback_later(
                self._allowed + STARVED_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr
            )
            waited = time.monotonic() - self._beat
            if waited > self._allowed or self._is_marked():
                self._end(waited)

    def _is_marked(self) -> bool:
        """Another rank has given up in this start; markers of earlier starts are older."""
        try:
            return (self._folder / MARKER).stat().st_mtime >= self._started
        except OSError:
            return False

    def _end(self, waited: float) -> None:
        message = (
            f"no step has ended on rank {self._rank} for {waited:.0f} s (train.hang_seconds = {self._limit:g}): a "
            f"process hangs. The stacks of all ranks are in {self._folder}; start the run again to resume"
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._is_marked():
                (self._folder / MARKER).write_text(message + "\n", encoding="utf-8")
            name = f"hang-{time.strftime('%Y%m%d-%H%M%S', time.localtime(self._started))}-rank{self._rank}.txt"
            with (self._folder / name).open("w", encoding="utf-8") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
            self._report(message)
            print(f"PeerError: {message}", file=sys.stderr, flush=True)
            time.sleep(min(GRACE_SECONDS, 2 * self._limit))
        finally:
            os._exit(EXIT_PEER)
