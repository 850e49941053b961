"""What a run does about steps that went wrong: say so, drop the update, return to a checkpoint, or end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ernie5.checkpoint.load import check_together, open_run
from ernie5.checkpoint.names import MANIFEST_FILE, list_checkpoints, step_of
from ernie5.checkpoint.save import point_latest
from ernie5.engine.interface import Engine, StepSums
from ernie5.errors import NumericsError
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import mean_losses, modality_weights
from ernie5.observe.alarms import Alarm, LoadAlarm, LossAlarm
from ernie5.observe.config import AlarmsConfig
from ernie5.observe.experts import summarise_loads
from ernie5.observe.log import get_log
from ernie5.records import Modality
from ernie5.train.hook import GoBack, Hook, StepContext
from ernie5.train.state import Progression

ADVICE = "Lower optim.learning_rate, or go on from an earlier checkpoint, where there is one, with --resume"


class AlarmHook(Hook):
    """Watches loss, gradient norm and expert loads, and does what observe.alarms asks for."""

    def __init__(self, config: AlarmsConfig, *, progression: Progression, retries: int,
                 objectives: ObjectivesConfig, steps: int, is_main: bool) -> None:
        self._config, self._progression, self._retries, self._is_main = config, progression, retries, is_main
        self._objectives, self._loss, self._load = objectives, LossAlarm(config), LoadAlarm(config, total_steps=steps)
        self._loss.load_state(progression.recent_losses)

    def drops(self, sums: StepSums) -> bool:
        """True for a loss that is not finite, and for a spike under on_spike = skip; gradients that are not, every
        engine drops by itself."""
        losses = self._losses_of(sums)
        if not all(map(math.isfinite, losses.values())):
            return True
        return self._config.on_spike == "skip" and self._loss.is_spike(losses)

    def after_step(self, context: StepContext) -> None:
        """Raises NumericsError or GoBack, on every rank: all of them see the same global losses."""
        sums = context.report.sums
        alarm = self._loss.check(self._losses_of(sums), grad_norm=float(context.report.grad_norm), step=context.step)
        self._progression.recent_losses = self._loss.state()
        if alarm is not None:
            self._act(alarm, is_last=context.is_last)
        if sums.routing.loads.shape[0] and self._config.load_ratio:
            ratios = summarise_loads(sums.routing.loads).max_ratio.tolist()
            load = self._load.check(ratios, step=context.step)
            if load is not None:
                get_log().info(load.message)

    def go_back(self, step: int) -> None:
        """The window is again what it was at `step`."""
        self._loss.load_state(self._progression.recent_losses)

    def _act(self, alarm: Alarm, *, is_last: bool) -> None:
        in_row = self._progression.skipped_in_row
        if alarm.action == "stop":
            raise NumericsError(f"{alarm.message}. {ADVICE}")
        if alarm.action == "rollback":
            raise GoBack(alarm.message)
        if alarm.action == "skip" and in_row > self._retries:
            raise NumericsError(
                f"{alarm.message}; {in_row} steps in a row were skipped, train.spike_retries = {self._retries}. "
                f"{ADVICE}"
            )
        if alarm.kind == "nan" and is_last:  # before the last checkpoint is saved, which would hide how the run ended
            raise NumericsError(
                f"{alarm.message}, and it is the last step ({in_row} in a row were skipped): a run that ends so is not "
                "done. Set observe.alarms.on_nan: rollback, which leaves out the data since the newest checkpoint. "
                f"{ADVICE}"
            )
        if self._is_main:
            dropped = f"; the update is dropped ({in_row} in a row)" if alarm.action == "skip" else ""
            get_log().warning("%s%s", alarm.message, dropped)

    def _losses_of(self, sums: StepSums) -> dict[str, float]:
        """Nats per target of every modality that is trained and in the step."""
        if not bool(torch.isfinite(sums.objective)):
            return {"objective": float(sums.objective)}
        means, weights = mean_losses(sums.terms, counts=sums.counts), modality_weights(self._objectives)
        names = [modality.name.lower() for modality, weight in zip(Modality, weights, strict=True) if weight]
        return {name: float(vars(means)[name]) for name in names if float(vars(sums.counts)[name])}


class Rollback:
    """Returns to the last good checkpoint and leaves out the data since: the cursor stays where the alarm found it.

    The first return goes to the newest checkpoint, each further one without a quiet stretch of `quiet_steps` in between
    to one before it, for the newest may hold the cause already. settle: waits for a save in flight, on every rank.
    """

    def __init__(self, folder: Path, *, engine: Engine, progression: Progression, settle: Callable[[], None],
                 retries: int, quiet_steps: int) -> None:
        self._folder, self._engine, self._progression, self._settle = folder, engine, progression, settle
        self._retries, self._quiet_steps = retries, quiet_steps
        self._returns, self._alarm_step = 0, 0

    def __call__(self, alarm: GoBack) -> None:
        """Restore engine, counters and generators. Raises NumericsError once the retries are used up, or where there
        is no checkpoint; CheckpointError for a damaged one."""
        step = self._progression.step
        if step > self._alarm_step + self._quiet_steps:
            self._returns = 0
        self._returns, self._alarm_step = self._returns + 1, step
        if self._returns > self._retries:
            raise NumericsError(
                f"{alarm}; {self._retries} returns to a checkpoint did not help, train.spike_retries = "
                f"{self._retries}. {ADVICE}"
            )
        self._settle()
        target = self._choose(step, alarm=alarm)
        loaded = open_run(target)
        check_together(loaded.directory, manifest=loaded.manifest, engine=self._engine)
        self._engine.load_state(loaded.engine)
        self._progression.restore(loaded.run)
        if self._engine.is_main:
            point_latest(self._folder, target=target)
            get_log().warning(
                "%s. Back to %s (%d of %d); the data of steps %d to %d are left out",
                alarm, target, self._returns, self._retries, self._progression.step + 1, step,
            )

    def _choose(self, step: int, *, alarm: GoBack) -> Path:
        whole = [path for path in list_checkpoints(self._folder)
                 if (path / MANIFEST_FILE).is_file() and (step_of(path.name) or 0) <= step]
        if not whole:
            raise NumericsError(
                f"{alarm}, and {self._folder} holds no checkpoint to return to. Lower checkpoint.every_steps or "
                "optim.learning_rate"
            )
        return whole[-min(self._returns, len(whole))]
