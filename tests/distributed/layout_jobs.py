"""Running rows of the layout table: the ranks of a job start once for several rows, and any that dies ends the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from layout_rows import LONG_STEPS, STEPS, Row

WORKER = Path(__file__).with_name("layout_worker.py")
LIMIT_SECONDS = 540.0
ROWS_PER_JOB = {STEPS: 12, LONG_STEPS: 6}
LOG_CHARACTERS = 3000


class Layouts:
    """Results of rows, which run when they are first asked for, together with others that are `wanted`.

    steps: of every row; a run of many steps, and one in bf16, replays the choices of its yardstick.
    """

    def __init__(
        self, folder: Path, *, wanted: Sequence[Row], steps: int, limit_seconds: float = LIMIT_SECONDS
    ) -> None:
        self._folder, self._steps, self._limit_seconds = folder, steps, limit_seconds
        self._wanted = {made.name: made for one in wanted for made in (one.yardstick(), one)}
        self._failed: dict[str, str] = {}

    def result(self, row: Row) -> dict:
        """What rank 0 saw of a row; raises RuntimeError with the ranks' last words where it did not come to its end."""
        while not self._path(row).exists():
            if row.name in self._failed:
                raise RuntimeError(self._failed[row.name])
            self._run(row)
        return torch.load(self._path(row), weights_only=False)

    def _path(self, row: Row) -> Path:
        return self._folder / f"{row.name}.pt"

    def _run(self, row: Row) -> None:
        """A job for `row` and others like it. The first without a result has ended the job; those after it can come
        again."""
        alike = [one for one in self._wanted.values() if (one.ranks, one.slow) == (row.ranks, row.slow)]
        rows = [row, *(one for one in alike if one.name != row.name and not self._is_done(one))]
        rows = rows[: ROWS_PER_JOB[self._steps]]
        for made in rows:
            if self._replays(made):
                self.result(made.yardstick())
        log = self._start(rows)
        missing = [made.name for made in rows if not self._path(made).exists()]
        if missing:
            self._failed[missing[0]] = f"{missing[0]} did not come to its end:\n{log}"

    def _is_done(self, row: Row) -> bool:
        return row.name in self._failed or self._path(row).exists()

    def _replays(self, row: Row) -> bool:
        return not row.is_local and (self._steps == LONG_STEPS or row.precision == "bf16")

    def _start(self, rows: list[Row]) -> str:
        """Run a job to its end; returns the ranks' last words."""
        references = [str(self._path(made.yardstick())) if self._replays(made) else None for made in rows]
        job = {
            "rows": [made.name for made in rows], "references": references, "steps": self._steps,
            "ranks": rows[0].ranks, "out": str(self._folder),
        }
        path = self._folder / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, str(WORKER), str(path)]
        try:
            done = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=self._limit_seconds, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
            )
        except subprocess.TimeoutExpired as expired:
            return f"still running after {self._limit_seconds:.0f} s\n{expired.output}"
        return done.stdout[-LOG_CHARACTERS:]
