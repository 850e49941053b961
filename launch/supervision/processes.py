"""The processes of one run on this host, found by a mark in their environment, whoever started them.

A rank whose launcher was killed belongs to nobody; it still carries the mark that it inherited.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

MARK = "ERNIE5_SUPERVISED"
GONE_SECONDS = 10.0


def mark_of(run_dir: Path, *, node_rank: int) -> str:
    """The mark of a run on one host: the same for every agent there, so that a new one finds an old one's ranks."""
    name = f"{run_dir.resolve()} node {node_rank}" if node_rank else str(run_dir.resolve())
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def marked_processes(mark: str) -> list[int]:
    """Ids of the processes that carry `mark`, this one excepted."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return sorted(found)


def kill_strays(mark: str) -> list[int]:
    """SIGKILL every marked process and wait until they are gone; returns the ids. Raises TimeoutError if some stay."""
    killed: list[int] = []
    deadline = time.monotonic() + GONE_SECONDS
    while strays := [number for number in marked_processes(mark) if not _is_zombie(number)]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {', '.join(map(str, strays))} of this run do not end; look at them with ps")
        for number in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        killed += [number for number in strays if number not in killed]
        time.sleep(0.05)
    return killed


def _is_zombie(number: int) -> bool:
    """Dead, and only waiting for its parent to ask; the name in brackets may hold spaces, the state follows it."""
    try:
        return Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rsplit(") ", 1)[1].startswith("Z")
    except OSError:
        return True
