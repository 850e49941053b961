"""Write a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, *, content: bytes) -> None:
    """Make `content` all that `path` holds; where the machine refuses (OSError) or kills, it holds what it held before.

    A link goes on pointing where it does; what is no file (/dev/stdout, a pipe) is written to.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        target.write_bytes(content)
        return
    aside = target.with_name(f".ernie5-{os.getpid()}-{target.name[:64]}")
    try:
        aside.write_bytes(content)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
