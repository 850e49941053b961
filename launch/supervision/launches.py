"""Which hosts' launchers run, in RUN_DIR/agents on the shared storage.

An agent that comes back at once, after its host's agent, launcher and ranks were killed, is quicker than the other
hosts notice: their launchers still run, and torchrun's rendezvous on node 0 still knows the dead ranks. Its ranks would
join that one, which ends, and wait for hosts that meet in the next. So it first lets those launchers end.

Standard library only.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

NAME = re.compile(r"launch-node-(\d+)")


class Launches:
    """This agent's launcher and those that ran beside its predecessor's. nodes: hosts of the run."""

    def __init__(self, run_dir: Path, *, node_rank: int, nodes: int) -> None:
        self._folder, self._nodes = run_dir / "agents", nodes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own = self._folder / f"launch-node-{node_rank}"
        was_cut_off = self._own.exists()
        self._own.unlink(missing_ok=True)  # before looking at others, who may be looking at this one
        self._beside = self._running() if was_cut_off else {}

    def remain(self) -> list[str]:
        """Launchers of other hosts that ran beside the one that was cut off here, and still do."""
        now = self._running()
        self._beside = {name: stamp for name, stamp in self._beside.items() if now.get(name) == stamp}
        return sorted(self._beside)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """This host's launcher runs inside; a killed agent leaves the word behind."""
        self._own.write_text("", encoding="utf-8")
        try:
            yield
        finally:
            self._own.unlink(missing_ok=True)

    def _running(self) -> dict[str, int]:
        found = {}
        for path in self._folder.glob("launch-node-*"):
            match = NAME.fullmatch(path.name)
            if match and int(match.group(1)) < self._nodes and path != self._own:
                with contextlib.suppress(FileNotFoundError):  # ended meanwhile
                    found[path.name] = path.stat().st_mtime_ns
        return found
