"""One checkpoint by all ranks, behind the training: each writes its own files, rank 0 makes a checkpoint of them.

What is left to agree on goes through the folder (a rank's record says that its files stand) and through one small sum
per step while a save is in flight (whether a rank has failed, whether the checkpoint stands).
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.parts import activity, missing_ranks
from ernie5.checkpoint.save import (
    Contents,
    PartPlan,
    begin_part,
    failures_explained,
    plan_part,
    prepare,
    publish,
    temporary_folder,
    write_part,
)
from ernie5.checkpoint.writer import BackgroundWriter, SaveStatus
from ernie5.errors import EnvironmentFault

POLL_SECONDS, LONGEST_PAUSE_SECONDS = 0.01, 0.3
# Without the others' word, rank 0 gives up on a checkpoint into which nobody has written for so long.
STILL_SECONDS = 5.0
ELSEWHERE = "saving failed on another rank; its message names the checkpoint that stands"


class SavingRanks(Protocol):
    """The ranks that save together, as an Engine has them. is_main: the one that publishes; gather: the values of those
    that write into one folder, that one's first; total: the sum over all."""

    @property
    def is_main(self) -> bool: ...

    def gather(self, value: dict) -> list[dict]: ...

    def total(self, number: float) -> float: ...


class Saver:
    """Saves into `folder`, at most one checkpoint at a time; seconds: what this rank's last one took. publishers: ranks
    that are main (one per host, where every host has a folder of its own)."""

    def __init__(
        self, folder: Path, *, config: CheckpointConfig, engine: SavingRanks, publishers: int = 1
    ) -> None:
        self._folder, self._config, self._engine, self._publishers = folder, config, engine, publishers
        self._writer = BackgroundWriter()
        self._is_void, self._is_alone = threading.Event(), threading.Event()
        self._temporary: Path | None = None

    @property
    def seconds(self) -> float:
        """What the last save took on this rank, in the background."""
        return self._writer.seconds

    def start(self, contents: Contents, *, behind: bool = False) -> None:
        """Begin to save, on every rank; collective. behind: what training changes is safe when this returns; else it
        must wait until the save is settled. Raises EnvironmentFault on every rank where rank 0 cannot make the
        folder; what fails later, `settle` tells."""
        self._is_void.clear()
        self._is_alone.clear()
        token = self._engine.gather({"token": f"{os.getpid()}-{time.time_ns():x}"})[0]["token"]
        temporary = temporary_folder(self._folder, step=contents.run.step, token=token)
        problem: EnvironmentFault | None = None
        if self._engine.is_main:
            try:
                with failures_explained(self._folder, temporary=temporary):
                    prepare(temporary)
            except EnvironmentFault as error:
                problem = error
        if self._engine.total(float(problem is not None)):
            raise problem or EnvironmentFault(ELSEWHERE)
        self._temporary = temporary
        plan = plan_part(contents, behind=behind)
        begun: OSError | None = None
        try:
            begin_part(temporary, plan=plan)
        except OSError as error:
            begun = error  # the others are about to settle: they are told there
        self._writer.start(self._job(contents, plan=plan, temporary=temporary, begun=begun))

    def settle(self, *, wait: bool) -> SaveStatus:
        """How the save in flight stands, the same on every rank; collective."""
        pause = POLL_SECONDS
        while True:
            status = self._writer.status(wait=False)
            if not self._engine.is_main and status == SaveStatus.DONE:
                status = SaveStatus.RUNNING  # this rank's part stands; only the main one knows of the whole
            agreed = int(self._engine.total(float(status)))
            if agreed >= SaveStatus.FAILED:
                self._is_void.set()
                self._writer.status(wait=True)
                self._engine.total(0.0)  # the others have stopped writing too: what is removed now stays removed
                self._remove_half()
                return SaveStatus.FAILED
            if agreed == self._publishers * SaveStatus.DONE:
                self._writer.status(wait=True)  # its record stands, so the thread is at its very end
                return SaveStatus.DONE
            if not wait:
                return SaveStatus.RUNNING
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def result(self) -> Path:
        """The checkpoint, on rank 0 and once it is settled. Raises what this rank's part ended in, or EnvironmentFault
        where it was another rank's."""
        if self._writer.error is None and self._is_void.is_set():
            raise EnvironmentFault(ELSEWHERE)
        return self._writer.result()

    def finish(self) -> Path:
        """As `result`, without asking other ranks, some of which may be gone: rank 0 waits while files still grow."""
        self._is_alone.set()
        try:
            return self.result()
        except Exception:
            self._remove_half()
            raise

    def _remove_half(self) -> None:
        if self._engine.is_main and self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _job(
        self, contents: Contents, *, plan: PartPlan, temporary: Path, begun: OSError | None
    ) -> Callable[[], Path]:
        def part() -> Path:
            with failures_explained(self._folder, temporary=None):
                _complete(temporary, plan=plan, begun=begun)
                if contents.rank > 0:
                    return temporary
                self._await_others(temporary, ranks=contents.ranks)
                return publish(temporary, contents=contents, config=self._config)

        return part

    def _await_others(self, temporary: Path, *, ranks: int) -> None:
        seen, since = (-1, -1), time.monotonic()
        while missing := missing_ranks(temporary, ranks=ranks):
            if self._is_void.is_set():
                raise EnvironmentFault(ELSEWHERE)
            found = activity(temporary)
            if found != seen:
                seen, since = found, time.monotonic()
            if self._is_alone.is_set() and time.monotonic() - since > STILL_SECONDS:
                raise EnvironmentFault(
                    f"rank {missing[0]} is gone and has not written its part: this save is void. The checkpoint before "
                    "it stands"
                )
            time.sleep(POLL_SECONDS)


def _complete(temporary: Path, *, plan: PartPlan, begun: OSError | None) -> None:
    """Write this rank's part, unless its beginning has failed. A folder that is gone was removed by a run that has
    started since."""
    try:
        if begun is not None:
            raise begun
        write_part(temporary, plan=plan)
    except FileNotFoundError as error:
        if plan.rank == 0 or temporary.is_dir():
            raise
        raise EnvironmentFault(ELSEWHERE) from error
