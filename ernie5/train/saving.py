"""When checkpoints are written, while training goes on: a step waits until its state is safe from the next one."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Protocol

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.names import NATIVE_FOLDER, step_name
from ernie5.checkpoint.retention import apply_retention, remove_leftovers
from ernie5.checkpoint.save import Contents
from ernie5.checkpoint.saver import Saver
from ernie5.checkpoint.writer import SaveStatus
from ernie5.data.loader import merge_states
from ernie5.engine.interface import Engine
from ernie5.errors import EnvironmentFault
from ernie5.observe.faults import refusal_of
from ernie5.observe.log import get_log
from ernie5.observe.metrics import Metrics
from ernie5.train.hooks import FiguresBoard
from ernie5.train.hook import Hook, StepContext
from ernie5.train.state import Progression


class Cursor(Protocol):
    """The part of a loader that a checkpoint needs."""

    def state_dict(self) -> dict:
        """JSON-able position of this rank's streams."""


@dataclasses.dataclass(frozen=True)
class CheckpointIdentity:
    """What a checkpoint says about the run: resolved configuration, precision, identities of tokenizers by name."""

    config_yaml: str
    precision: str
    tokenizers: dict[str, str]


class Snapshot:
    """Takes what this rank puts into a checkpoint, once the figures of the run are on disk as far as it reaches."""

    def __init__(self, *, engine: Engine, progression: Progression, data: Cursor, identity: CheckpointIdentity,
                 metrics: Metrics) -> None:
        self._engine, self._progression, self._data = engine, progression, data
        self._identity, self._metrics = identity, metrics

    def take(self) -> Contents:
        """This rank's slices, as views of live memory, and the rest of the state; collective."""
        self._metrics.flush()
        return Contents(
            slices=tuple(self._engine.slices()),
            updates=self._engine.updates,
            magnitudes=self._engine.magnitudes.cpu().clone(),
            run=self._progression.snapshot(data=merge_states(self._engine.gather(self._data.state_dict()))),
            config_yaml=self._identity.config_yaml,
            precision=self._identity.precision,
            tokenizers=self._identity.tokenizers,
            rank=self._engine.rank,
            ranks=self._engine.world_size,
        )


def save_native(folder: Path, *, engine: Engine, step: int, config: CheckpointConfig) -> None:
    """DeepSpeed's files after `step` under the name of our own checkpoint, of which as many stay; collective.

    Raises EnvironmentFault on the rank whose disk refuses.
    """
    try:
        engine.save_native(folder, name=step_name(step))
        if engine.is_main:
            remove_leftovers(folder)
            apply_retention(folder, newest=step, config=config)
    except OSError as error:
        refusal = refusal_of(error, place="checkpoint.dir=DIR, or set checkpoint.format: ernie5")
        raise EnvironmentFault(f"saving DeepSpeed's files to {folder} failed: {refusal}") from error


class CheckpointHook(Hook):
    """Saves on the steps of the rhythm, at the end, and on request; every rank learns how a save ended."""

    def __init__(
        self,
        folder: Path,
        *,
        config: CheckpointConfig,
        engine: Engine,
        progression: Progression,
        snapshot: Snapshot,
        board: FiguresBoard,
    ) -> None:
        self._folder, self._config, self._engine, self._progression = folder, config, engine, progression
        self._snapshot, self._board = snapshot, board
        self._saver = Saver(folder, config=config, engine=engine)
        self._begun_step: int | None = None
        self._saved_step, self._saved_path = -1, ""

    def after_step(self, context: StepContext) -> None:
        """Save if it is time; never in the middle of skipped steps. Raises what a save in flight ended in."""
        self._settle(wait=False)
        due = self._config.every_steps and context.step % self._config.every_steps == 0
        if context.is_last or (due and not context.report.skipped):
            self._begin(wait=context.is_last or not self._config.asynchronous)

    def save_now(self) -> str:
        """Save the present state once, wait for it, and return the path. Raises EnvironmentFault on every rank if it
        fails."""
        self._begin(wait=True)
        return self._saved_path

    def settle(self) -> None:
        """Wait for a save in flight, on every rank. Raises what it ended in."""
        self._settle(wait=True)

    def go_back(self, step: int) -> None:
        """The state of `step` is saved, but not with the cursor that the run goes on from."""
        self._saved_step = -1

    def finish(self) -> None:
        """Wait for a save in flight, without asking other ranks: some of them may be gone."""
        if self._begun_step is not None:
            self._saver.finish()

    def _begin(self, *, wait: bool) -> None:
        """Start writing the state, unless it is saved already; counts the seconds that training waits."""
        started = time.perf_counter()
        if self._begun_step is not None:
            self._settle(wait=wait or self._begun_step != self._progression.step)
        if self._begun_step is None and self._saved_step != self._progression.step:
            self._saver.start(self._snapshot.take(), behind=not wait)
            self._begun_step = self._progression.step
            if self._config.format == "deepspeed":
                save_native(
                    self._folder / NATIVE_FOLDER, engine=self._engine, step=self._begun_step, config=self._config
                )
            if wait:
                self._settle(wait=True)
        self._board.stall_seconds += time.perf_counter() - started

    def _settle(self, *, wait: bool) -> None:
        """Let every rank know how the save in flight stands."""
        if self._begun_step is None:
            return
        status = self._saver.settle(wait=wait)
        if status == SaveStatus.RUNNING:
            return
        step, self._begun_step = self._begun_step, None
        path = self._saver.result()
        self._saved_step = step
        if self._engine.is_main:
            self._saved_path = str(path)
            get_log().info("saved %s, written in %.2f s", self._saved_path, self._saver.seconds)
