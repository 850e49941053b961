"""What an agent that gives up leaves for the others, in RUN_DIR/agents on the shared storage: they would wait for its
ranks until the rendezvous or a collective loses patience, and start again to wait once more.

Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from pathlib import Path

NAME = re.compile(r"ended-node-(\d+)\.json")
# A word that is there when an agent starts is of the same attempt where that host was quicker, or of the one before. It
# counts if it is no older than this, and if no agent of that host comes and takes it back within the second.
RECENT_SECONDS, COMING_SECONDS = 600.0, 120.0


@dataclasses.dataclass(frozen=True)
class Ending:
    """An agent's last word. node: its number; host: its machine; code: its exit code; reason: one line."""

    node: int
    host: str
    code: int
    reason: str

    def __str__(self) -> str:
        return f"node {self.node} ({self.host}) gave up with exit code {self.code}: {self.reason}"


class Endings:
    """This agent's word and those of the others. nodes: hosts of the run, 1 where nobody said how many."""

    def __init__(self, run_dir: Path, *, node_rank: int, nodes: int) -> None:
        self._folder, self._own, self._nodes = run_dir / "agents", node_rank, nodes
        self._folder.mkdir(parents=True, exist_ok=True)
        own = self._path(node_rank)
        own.write_text("", encoding="utf-8")  # its time is that of the storage's clock, as theirs are
        now = own.stat().st_mtime
        own.unlink()
        self._began = time.monotonic()
        self._found = {path.name: path.stat().st_mtime_ns for path, _ in self._others()}
        self._may_count = {name for name, stamp in self._found.items() if stamp / 1e9 > now - RECENT_SECONDS}

    def leave(self, *, code: int, reason: str) -> None:
        """Tell the others that no more starts follow here."""
        word = Ending(self._own, socket.gethostname(), code, " ".join(reason.split()))
        temporary = self._folder / f".ended-{self._own}-{os.getpid()}"
        temporary.write_text(json.dumps(dataclasses.asdict(word)), encoding="utf-8")
        temporary.replace(self._path(self._own))

    def seen(self) -> Ending | None:
        """Another agent's word on this attempt, None while there is none."""
        for path, node in self._others():
            with contextlib.suppress(OSError, ValueError, TypeError):  # taken back meanwhile
                is_new = path.stat().st_mtime_ns != self._found.get(path.name)
                if is_new or self._has_stayed(path.name, node=node):
                    return Ending(**json.loads(path.read_text(encoding="utf-8")))
        return None

    def _has_stayed(self, name: str, *, node: int) -> bool:
        is_late = time.monotonic() - self._began > COMING_SECONDS
        return is_late and node < self._nodes and name in self._may_count

    def _others(self) -> list[tuple[Path, int]]:
        named = ((path, NAME.fullmatch(path.name)) for path in self._folder.glob("ended-node-*.json"))
        found = [(path, int(match.group(1))) for path, match in named if match]
        return sorted((path, node) for path, node in found if node != self._own)

    def _path(self, node: int) -> Path:
        return self._folder / f"ended-node-{node}.json"
