"""Never a silent hang: where no step ends for too long, or the next machine cannot be reached, every rank writes down
where it stands and who is missing, and ends with code 5.

A thread watches each rank. The first that has waited too long leaves a marker in RUN_DIR/errors, on whose sight the
watchdogs of the other ranks write their stacks too, wherever in a step they wait; a grace period later all of them end
their process. Where a library holds the interpreter, no thread of ours runs: then faulthandler's own timer, which the
watchdog pushes back as long as it lives, writes the stacks to stderr and ends the process.
"""

from __future__ import annotations

import faulthandler
import math
import os
import socket
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

from ernie5.errors import EXIT_PEER
from ernie5.observe.peers import Peers
from ernie5.observe.standing import standing_of_thread

MARKER = "hang"
START_SECONDS = 1800.0  # until the first step: rendezvous, loading, the kernels' first compilation
GRACE_SECONDS = 10.0
STARVED_SECONDS = 120.0
LOOK_SECONDS = 5.0  # between two looks at the next machine


class Watchdog:
    """Ends the process with exit code 5 when `beat` has not been called for `limit_seconds`, or when the machine of the
    next rank has been unreachable for `peer_seconds`; 0 switches either off.

    report: called with one line before the end, by every rank, to write exit.json.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, limit_seconds: float, peer_seconds: float, report: Callable[[str], None]
    ) -> None:
        self._folder, self._rank, self._limit, self._report = run_dir / "errors", rank, limit_seconds, report
        self._lookout, self._main = _Lookout(peer_seconds), threading.get_ident()
        self._allowed = max(limit_seconds, START_SECONDS) if limit_seconds else math.inf
        self._beat, self._started = time.monotonic(), time.time()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit or self._lookout.limit:
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
        self._beat, self._allowed = time.monotonic(), self._limit or math.inf

    def look_after(self, peers: Peers) -> None:
        """From now on, watch the next machine too, and say at the end who is missing."""
        self._lookout.peers = peers

    def _watch(self) -> None:
        pauses = [limit / 4 for limit in (self._limit, self._lookout.limit) if limit]
        while not self._ended.wait(min(1.0, *pauses)):
            if self._limit:
                faulthandler.dump_traceback_later(
                    self._allowed + STARVED_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr
                )
            waited = time.monotonic() - self._beat
            if waited > self._allowed:
                self._end(
                    f"no step has ended for {waited:.0f} s, a process hangs (train.hang_seconds = {self._limit:g})"
                )
            if self._is_marked():
                self._end("another rank has given up")
            if lost := self._lookout.lost():
                self._end(lost)

    def _is_marked(self) -> bool:
        """Another rank has given up in this start; markers of earlier starts are older."""
        try:
            return (self._folder / MARKER).stat().st_mtime >= self._started
        except OSError:
            return False

    def _end(self, why: str) -> None:
        """Say it first, then leave marker and stacks: the storage may be behind the same broken network."""
        try:
            standing = standing_of_thread(self._main)
            message = (
                f"rank {self._rank} on {socket.gethostname()}: {why}. It stands in {standing}; "
                f"{self._lookout.explain(standing.ranks)}. The stacks of all ranks are in {self._folder}; start the "
                "run again: it goes on from its newest checkpoint, or from the beginning where there is none"
            )
            print(f"PeerError: {message}", file=sys.stderr, flush=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            if not self._is_marked():
                (self._folder / MARKER).write_text(message + "\n", encoding="utf-8")
            name = f"hang-{time.strftime('%Y%m%d-%H%M%S', time.localtime(self._started))}-rank{self._rank}.txt"
            with (self._folder / name).open("w", encoding="utf-8") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
            self._report(message)
            time.sleep(min(GRACE_SECONDS, 2 * (self._limit or GRACE_SECONDS)))
        finally:
            os._exit(EXIT_PEER)


class _Lookout:
    """Looks at the next machine every few seconds; `limit` seconds without a sign of it are too long, 0: never."""

    def __init__(self, limit: float) -> None:
        self.limit, self.peers = limit, None
        self._looked = self._seen = time.monotonic()

    def lost(self) -> str:
        """Why the run must end; "" while the machine was seen within the limit. Takes seconds where it is gone."""
        neighbour = self.peers.neighbour if self.peers is not None and self.limit else None
        now = time.monotonic()
        if neighbour is None:
            self._looked = self._seen = now
        elif now - self._looked > min(LOOK_SECONDS, self.limit / 4):
            self._looked = now
            if self.peers.is_reachable(neighbour):
                self._seen = now
            elif time.monotonic() - self._seen > self.limit:
                return f"the machine of {neighbour} does not answer (train.peer_seconds = {self.limit:g})"
        return ""

    def explain(self, ranks: tuple[int, ...]) -> str:
        """Who is missing, as far as this rank can see."""
        return self.peers.explain(ranks) if self.peers is not None else "the ranks had not met yet"
