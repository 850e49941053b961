"""Types of command-line arguments that refuse before anything is measured what would end in a traceback after it."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path


def at_least(least: int, *, multiple: int = 1) -> Callable[[str], int]:
    """A whole number of at least `least` and a multiple of `multiple`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least or value % multiple:
            rule = f"at least {least}" if multiple == 1 else f"a multiple of {multiple}, at least {least}"
            raise argparse.ArgumentTypeError(f"it is {value} and must be {rule}")
        return value

    return number


def folder(text: str) -> Path:
    """A folder that can be written to, made where it is missing."""
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
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, and a file is written")
    folder(str(path.parent))
    return path
