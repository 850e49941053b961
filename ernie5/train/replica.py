"""The last step in shared memory: a checkpoint like any other, in a folder that outlives the ranks but not the machine.

launch/supervise.py owns the folder (environment variable ERNIE5_REPLICA) and empties it at its own start and end. After
a process is lost, ranks continue from there without reading the disk, if all of them found the same step there.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import LoadedRun, check_together, open_run
from ernie5.checkpoint.names import latest_checkpoint, step_of
from ernie5.checkpoint.retention import clear_checkpoints
from ernie5.checkpoint.saver import Saver
from ernie5.checkpoint.writer import SaveStatus
from ernie5.engine.interface import Engine
from ernie5.errors import CheckpointError, EnvironmentFault
from ernie5.observe.log import get_log
from ernie5.train.hook import Hook, StepContext
from ernie5.train.saving import Snapshot

REPLICA_VARIABLE = "ERNIE5_REPLICA"
ONE = CheckpointConfig(keep=1)


class ReplicaHook(Hook):
    """Copies the state into the folder after every `every` steps, behind the training; a failure never ends the run."""

    def __init__(self, folder: Path, *, every: int, engine: Engine, snapshot: Snapshot) -> None:
        self._folder, self._every, self._engine, self._snapshot = folder, every, engine, snapshot
        hosts = {found["host"] for found in engine.gather({"host": socket.gethostname()})}
        self._is_on = len(hosts) == 1
        if not self._is_on and engine.is_main:
            get_log().info("no replica in memory, for it is for one host and there are %d: restarts read the disk",
                           len(hosts))
        self._saver = Saver(folder, config=ONE, engine=engine)
        self._is_begun, self._is_warned = False, False

    def after_step(self, context: StepContext) -> None:
        """Copy this rank's part, once the copy before is written; collective."""
        if not self._is_on or context.step % self._every or context.report.skipped or context.is_last:
            return
        self._settle()
        try:
            self._saver.start(self._snapshot.take(), behind=True)
            self._is_begun = True
        except EnvironmentFault as error:
            self._warn(error)

    def go_back(self, step: int) -> None:
        """What the folder holds was undone; collective."""
        self._settle()
        if self._engine.is_main:
            clear_checkpoints(self._folder)

    def finish(self) -> None:
        """Let the copy under way be written."""
        if self._is_begun:
            try:
                self._saver.finish()
            except Exception as error:  # a run that ends well, or by another error, has no use for this one
                self._warn(error)

    def _settle(self) -> None:
        if self._is_begun:
            self._is_begun = False
            if self._saver.settle(wait=True) == SaveStatus.FAILED:
                try:
                    self._saver.result()
                except Exception as error:  # whatever went wrong, the run has checkpoints on disk
                    self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._is_warned:
            self._is_warned = True
            get_log().warning("no replica in memory: %s", error)


def replica_folder() -> Path | None:
    """Where the agent of this host wants the replica; none without an agent."""
    named = os.environ.get(REPLICA_VARIABLE)
    return Path(named) if named else None


def open_newest(source: Path | None) -> LoadedRun | None:
    """The replica where it is farther than the checkpoint `source`, else that checkpoint; none for neither.

    Every rank calls it by itself, before the ranks know each other; `agree` follows and looks at the bytes.
    """
    folder = replica_folder()
    replica = latest_checkpoint(folder) if folder is not None else None
    if replica is not None and (step_of(replica.name) or 0) > _step_of(source):
        try:
            return open_run(replica)
        except CheckpointError as error:
            get_log().warning("the replica in memory is of no use: %s", error)
    return open_run(source) if source is not None else None


def agree(loaded: LoadedRun | None, *, source: Path | None, engine: Engine) -> LoadedRun | None:
    """What every rank continues from: `loaded` if all found the same step and its bytes are whole, else the checkpoint
    on disk. Collective. Raises CheckpointError, on every rank, where that one is damaged."""
    steps = [found["step"] for found in engine.gather({"step": -1 if loaded is None else loaded.run.step})]
    if len(set(steps)) > 1:
        if engine.is_main:
            get_log().warning("the ranks found steps %s in memory: going on from %s", steps, source or "the beginning")
        loaded = open_run(source) if source is not None else None
    if loaded is None:
        return None
    try:
        check_together(loaded.directory, manifest=loaded.manifest, engine=engine)
    except CheckpointError as error:
        if source is None or loaded.directory.resolve() != source.resolve():
            get_log().warning("the replica in memory is of no use: %s", error)
            return agree(open_run(source) if source is not None else None, source=source, engine=engine)
        raise
    return loaded


def _step_of(source: Path | None) -> int:
    return -1 if source is None else step_of(source.name) or 0
