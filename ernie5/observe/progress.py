"""Progress bars: tqdm on a terminal, a plain line now and then elsewhere, nothing when switched off; torch-free."""

from __future__ import annotations

import sys
import time
import types

from ernie5.observe.log import get_log

PLAIN_INTERVAL_SECONDS = 20.0


class Progress:
    """A bar over `total` units, used as a context manager.

    mode: "on" draws always, "off" never, "auto" draws on a terminal and writes a log line every 20 seconds elsewhere,
    so that a log file of a CI job shows life without thousands of carriage returns.
    """

    def __init__(self, total: int, *, title: str, unit: str = "step", done: int = 0, mode: str = "auto") -> None:
        self._title, self._unit, self._total, self._done, self._first = title, unit, total, done, done
        self._plain = mode == "auto" and not sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        self._bar = None
        if mode == "on" or (mode == "auto" and not self._plain):
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count units as done; `note` (a loss, a file name) stands at the end of the bar."""
        self._done += count
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif self._plain and time.monotonic() - self._last >= PLAIN_INTERVAL_SECONDS:
            self._last = time.monotonic()
            get_log().info(self.line(note=note))

    def move_to(self, done: int) -> None:
        """Stand at `done` units, also fewer than before."""
        self._done = done
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()

    def line(self, *, note: str = "") -> str:
        """The state as one plain line."""
        seconds = time.monotonic() - self._started
        rate = (self._done - self._first) / seconds if seconds > 0 else 0.0
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 else ""
        return f"{self._title}: {self._done}/{self._total} {self._unit}s{left}{f', {note}' if note else ''}"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
