"""The log of a run: plain lines on stderr and in RUN_DIR/log.txt; torch-free."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import typing
from pathlib import Path

LOGGER_NAME = "ernie5"


def get_log() -> logging.Logger:
    """The one logger of ernie5; silent below WARNING until `open_log` has been called."""
    return logging.getLogger(LOGGER_NAME)


def open_log(run_dir: Path | None, *, rank: int = 0) -> logging.Logger:
    """Send the log to stderr and, where there is a run directory, append it to RUN_DIR/log.txt.

    Rank 0 writes everything from INFO on; other ranks write warnings and errors, marked with their rank. Calling again
    replaces the destinations. Raises OSError where the file cannot be written.
    """
    log = get_log()
    for handler in list(log.handlers):
        log.removeHandler(handler)
        with contextlib.suppress(OSError):  # lines that the disk has not taken
            handler.close()
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    mark = "" if rank == 0 else f"[rank {rank}] "
    handlers: list[logging.Handler] = [_TerminalHandler()]
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        handlers.append(_FileHandler(run_dir / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {mark}%(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(handler)
    return log


class _TerminalHandler(logging.Handler):
    """Writes above a running progress bar instead of through it; looks up stderr anew each time (tests replace it).

    A reader that has gone (`2>&1 | head`, a closed session) ends no run: log.txt goes on.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not say(self.format(record), stream=sys.stderr):
            get_log().warning("nobody reads stderr any more: the log goes on in log.txt alone")


class _FileHandler(logging.FileHandler):
    """log.txt; a line that the disk does not take ends no run either, which is said once."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            say(f"{self.baseFilename} cannot be written ({error.strerror}): the log goes on here", stream=sys.stderr)


def say(text: str, *, stream: typing.TextIO) -> bool:
    """Print a line. False where its reader has gone: what is still written to `stream` goes nowhere, and nothing that
    is done for a file ends for it."""
    try:
        _write(text, stream=stream)
    except (BrokenPipeError, ConnectionResetError):
        _redirect_to_nothing(stream)
        return False
    return True


def _write(text: str, *, stream: typing.TextIO) -> None:
    if not stream.isatty():
        print(text, file=stream, flush=True)
        return
    from tqdm import tqdm

    tqdm.write(text, file=stream)


def _redirect_to_nothing(stream: typing.TextIO) -> None:
    """Whatever is still written to it, by libraries and at Python's end, cannot fail."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)
