"""The last step in shared memory: a checkpoint like any other, in a folder that outlives the ranks but not the machine.

launch/supervise.py owns the folder (environment variable ERNIE5_REPLICA) and empties it at its own start and end. After
a process is lost, ranks continue from there without reading the disk, if all of them found the same step there.
"""

from __future__ import annotations

import os
from pathlib import Path

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import LoadedRun, check_same, check_together, open_run
from ernie5.checkpoint.names import latest_checkpoint, step_of
from ernie5.checkpoint.retention import clear_checkpoints
from ernie5.checkpoint.saver import Saver
from ernie5.checkpoint.writer import SaveStatus
from ernie5.engine.interface import Engine
from ernie5.errors import CheckpointError, EnvironmentFault
from ernie5.observe.log import get_log
from ernie5.train.hook import Hook, StepContext
from ernie5.train.neighbours import NEIGHBOURS_VARIABLE, HostRanks, find_common, is_carried
from ernie5.train.saving import Snapshot

REPLICA_VARIABLE = "ERNIE5_REPLICA"
ONE, TWO = CheckpointConfig(keep=1), CheckpointConfig(keep=2)


class ReplicaHook(Hook):
    """Copies the state into the folder after every `every` steps, behind the training; a failure never ends the run.

    On several hosts each keeps the part of its own ranks, two steps of it: a step is begun once the agents have carried
    the one before to the neighbours, so that all hosts share a step at any time.
    """

    def __init__(self, folder: Path, *, every: int, engine: Engine, snapshot: Snapshot) -> None:
        self._folder, self._every, self._engine, self._snapshot = folder, every, engine, snapshot
        hosts = HostRanks(engine, folder=folder)
        carries = engine.total(float(NEIGHBOURS_VARIABLE in os.environ)) == engine.world_size
        self._is_on = carries or hosts.num_hosts == 1
        if not self._is_on and engine.is_main:
            get_log().info("no replica in memory: there are %d hosts, and their agents were not told (NODES or --nodes)"
                           ": restarts read the disk", hosts.num_hosts)
        self._hosts = hosts if hosts.num_hosts > 1 else None
        if self._hosts is None:
            self._saver = Saver(folder, config=ONE, engine=engine)
        else:
            self._saver = Saver(folder, config=TWO, engine=hosts, publishers=hosts.num_hosts)
        self._is_begun, self._is_warned = False, False
        self._last_part = ""

    def after_step(self, context: StepContext) -> None:
        """Copy this rank's part, once the copy before is written; collective."""
        if not self._is_on or context.step % self._every or context.report.skipped or context.is_last:
            return
        self._settle()
        if self._is_being_carried():
            return
        try:
            contents = self._snapshot.take()
            contents = contents if self._hosts is None else self._hosts.part(contents)
            self._saver.start(contents, behind=True)
            self._is_begun, self._last_part = True, contents.part_of
        except EnvironmentFault as error:
            self._warn(error)

    def go_back(self, step: int) -> None:
        """What the folder holds was undone; collective."""
        self._settle()
        self._last_part = ""
        if self._engine.is_main if self._hosts is None else self._hosts.is_main:
            clear_checkpoints(self._folder)

    def finish(self) -> None:
        """Let the copy under way be written."""
        if self._is_begun:
            try:
                self._saver.finish()
            except Exception as error:  # a run that ends well, or by another error, has no use for this one
                self._warn(error)

    def _is_being_carried(self) -> bool:
        """Whether a host's agent is still at work on the part of the last step; the same on every rank."""
        if not self._last_part:
            return False
        return self._engine.total(float(not is_carried(self._folder, part_of=self._last_part))) > 0

    def _settle(self) -> None:
        if self._is_begun:
            self._is_begun = False
            if self._saver.settle(wait=True) == SaveStatus.FAILED:
                self._last_part = ""  # nothing to carry
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
            return open_run(replica, may_be_part=True)
        except CheckpointError as error:
            get_log().warning("the replica in memory is of no use: %s", error)
    return open_run(source) if source is not None else None


def agree(loaded: LoadedRun | None, *, source: Path | None, engine: Engine) -> LoadedRun | None:
    """What every rank continues from: `loaded` if all found the same step and its bytes are whole, else the checkpoint
    on disk. On several hosts each brings its own part. Collective. Raises, on every rank, EnvironmentFault where the
    ranks see different ones on disk, CheckpointError where that one is damaged."""
    check_same(source, engine=engine)
    part = find_common(replica_folder(), disk_step=_step_of(source), engine=engine)
    if part is not None:
        return part
    if loaded is not None and loaded.manifest.part_of:
        loaded = open_run(source) if source is not None else None
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
