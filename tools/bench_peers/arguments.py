"""Types of command-line arguments that refuse before anything is measured what would end in a traceback after it; for
all tools that measure."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ernie5.errors import Ernie5Error


def at_least(least: int, *, multiple: int = 1, most: float = math.inf) -> Callable[[str], int]:
    """A whole number of at least `least`, at most `most`, and a multiple of `multiple`."""

    def number(text: str) -> int:
        value = int(text)
        if not least <= value <= most or value % multiple:
            rule = f"at least {least}" if multiple == 1 else f"a multiple of {multiple}, at least {least}"
            rule += "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"it is {value} and must be {rule}")
        return value

    return number


def num_threads(text: str) -> int:
    """At most one per processor that this process may use: OpenMP ends with a crash where it cannot start them."""
    return at_least(1, most=len(os.sched_getaffinity(0)))(text)


def ended_in_words(main: Callable[[], int | None]) -> int:
    """The exit code of `main`; where it ends in an error that a user can mend, after one line that says it."""
    try:
        return main() or 0
    except Ernie5Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def folder(text: str) -> Path:
    """A folder that can be written to, made where it is missing."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder, `.` for this one")
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to the folder {path}: {error.strerror}") from None
    return path


def file(text: str) -> Path:
    """A file in a folder that can be written to."""
    path = Path(text)
    if path.is_dir() and text:
        raise argparse.ArgumentTypeError(f"{path} is a folder, and a file is written")
    folder(text and str(path.parent))
    return path
