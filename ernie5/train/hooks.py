"""What happens after a step, as an explicit ordered list (`build_hooks` in build.py): figures, validation, routing,
writing; alarms (rollback.py), checkpoints (saving.py), the replica (replica.py) and samples (samples.py) follow. Each
hook is small, owns its rhythm, and runs on every rank.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ernie5.engine.interface import Engine, StepSums
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import mean_losses, weighted_loss
from ernie5.observe.experts import bias_spread, summarise_loads
from ernie5.observe.metrics import Figures, Metrics
from ernie5.observe.sinks import keep_until_step
from ernie5.observe.throughput import MatrixRate, step_speed
from ernie5.observe.watchdog import Watchdog
from ernie5.records import Batch, LossTerms, Modality, RoutingStats, TargetCounts
from ernie5.train.hook import Hook, StepContext
from ernie5.train.state import Progression


@dataclasses.dataclass
class FiguresBoard:
    """The figures of the current step, filled by the hooks before RecordHook; stall_seconds: waited for a checkpoint
    since the step before (its row was on disk first)."""

    current: Figures
    stall_seconds: float = 0.0


class StepFiguresHook(Hook):
    """Losses, norms, rates and balance of the step."""

    def __init__(
        self,
        board: FiguresBoard,
        *,
        engine: Engine,
        progression: Progression,
        objectives: ObjectivesConfig,
        flops_per_token: float,
        rate: MatrixRate,
    ) -> None:
        self._board, self._engine, self._progression = board, engine, progression
        self._objectives, self._flops, self._rate = objectives, flops_per_token, rate

    def after_step(self, context: StepContext) -> None:
        """Start the step's figures."""
        sums, figures = context.report.sums, Figures(context.step)
        speed = step_speed(
            int(sums.counts.tokens),
            seconds=context.seconds,
            flops_per_token=self._flops,
            rate=self._rate,
            devices=self._engine.world_size,
        )
        figures.add("tokens", self._progression.tokens)
        add_losses(figures, sums=sums, objectives=self._objectives, prefix="")
        figures.add("loss/objective", sums.objective)
        figures.add("grad_norm", context.report.grad_norm)
        figures.add("lr", context.learning_rate)
        figures.add("tokens_per_second", speed.tokens_per_second)
        figures.add("mfu", speed.mfu)
        figures.add("step_seconds", speed.step_seconds)
        figures.add("data_seconds", context.data_seconds)
        figures.add("save/stall_seconds", self._board.stall_seconds)
        self._board.stall_seconds = 0.0
        figures.add("skipped", int(context.report.skipped))
        for modality in Modality:
            figures.add(f"magnitude/{modality.name.lower()}", self._engine.magnitudes[modality])
        if sums.routing.loads.shape[0]:
            self._add_balance(figures, loads=sums.routing.loads)
        self._board.current = figures

    def _add_balance(self, figures: Figures, *, loads: torch.Tensor) -> None:
        summary = summarise_loads(loads)
        bias = torch.stack([router.balance_bias for router in self._engine.model.routers()])
        figures.add("moe/load_entropy", summary.entropy.nanmean())
        figures.add("moe/max_load_ratio", summary.max_ratio.max())
        figures.add("moe/dead_experts", summary.dead.sum())
        figures.add("moe/bias_spread", bias_spread(bias).max())


class ValidationHook(Hook):
    """Losses on fixed batches of the validation split."""

    def __init__(
        self, board: FiguresBoard, *, engine: Engine, batches: Sequence[Batch], every: int, objectives: ObjectivesConfig
    ) -> None:
        self._board, self._engine, self._batches = board, engine, tuple(batches)
        self._every, self._objectives = every, objectives

    def after_step(self, context: StepContext) -> None:
        """Evaluate on the steps of the rhythm and on the last one."""
        if self._every and self._batches and (context.step % self._every == 0 or context.is_last):
            sums = add_sums([self._engine.evaluate_batch(batch) for batch in self._batches])
            add_losses(self._board.current, sums=sums, objectives=self._objectives, prefix="validation/")


class RoutingHook(Hook):
    """Expert loads by token kind, summed between snapshots, appended to RUN_DIR/routing.jsonl. What is summed since the
    last line is part of the run's state: a checkpoint may be saved after any step."""

    def __init__(self, path: Path, *, every: int, is_main: bool, progression: Progression) -> None:
        self._path, self._every, self._is_main, self._progression = path, every, is_main, progression

    def after_step(self, context: StepContext) -> None:
        """Add this step's loads; write and start over on the steps of the rhythm."""
        loads = context.report.sums.routing.group_loads
        if not (self._every and self._is_main and loads.shape[0]):
            return
        so_far = self._progression.routing
        loads = loads.clone() if so_far is None else loads + so_far.to(loads.device)
        self._progression.routing = loads
        if context.step % self._every == 0 or context.is_last:
            line = json.dumps({"step": context.step, "group_loads": loads.long().tolist()})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            self._progression.routing = None

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps."""
        if self._is_main:
            keep_until_step(self._path, last_step=step)


class RecordHook(Hook):
    """Writes the figures to the sinks."""

    def __init__(self, board: FiguresBoard, *, metrics: Metrics) -> None:
        self._board, self._metrics = board, metrics

    def after_step(self, context: StepContext) -> None:
        """Hand the figures over."""
        self._metrics.record(self._board.current)

    def finish(self) -> None:
        """Flush and close the sinks."""
        self._metrics.close()

    def save_now(self) -> str:
        """Flush, so that the metrics reach as far as the checkpoint that is about to be written."""
        self._metrics.flush()
        return ""

    def go_back(self, step: int) -> None:
        """Drop the rows of later steps, which are done again on other data."""
        self._metrics.go_back(step)


class BeatHook(Hook):
    """Last of the list: tells the watchdog that a step has ended, with all that happens after it."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def after_step(self, context: StepContext) -> None:
        """One beat."""
        self._watchdog.beat()

    def go_back(self, step: int) -> None:
        """Going back ends a step as well."""
        self._watchdog.beat()


def add_losses(figures: Figures, *, sums: StepSums, objectives: ObjectivesConfig, prefix: str) -> None:
    """Add `loss` (user weight x raw, summed) and `loss/<modality>` in nats per target; absent ones are NaN."""
    means = mean_losses(sums.terms, counts=sums.counts)
    figures.add(f"{prefix}loss", weighted_loss(means, counts=sums.counts, config=objectives))
    for field in dataclasses.fields(LossTerms):
        figures.add(f"{prefix}loss/{field.name}", getattr(means, field.name))


def add_sums(parts: Sequence[StepSums]) -> StepSums:
    """Sums over several evaluation batches; routing losses, which validation does not show, are added as they are."""
    total = parts[0]
    for part in parts[1:]:
        terms = LossTerms(
            *(getattr(total.terms, f.name) + getattr(part.terms, f.name) for f in dataclasses.fields(LossTerms))
        )
        routing = RoutingStats(
            *(getattr(total.routing, f.name) + getattr(part.routing, f.name) for f in dataclasses.fields(RoutingStats))
        )
        counts: TargetCounts = total.counts + part.counts
        total = StepSums(terms=terms, counts=counts, routing=routing, objective=total.objective + part.objective)
    return total
