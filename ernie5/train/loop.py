"""The loop of every workflow: one batch, one step, the hooks in order, until the last step or a signal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ernie5.engine.interface import Engine
from ernie5.errors import Interrupted, NumericsError
from ernie5.observe.log import get_log
from ernie5.observe.progress import Progress
from ernie5.optim.config import OptimConfig
from ernie5.optim.schedule import learning_rate
from ernie5.records import Batch
from ernie5.train.hook import GoBack, Hook, StepContext
from ernie5.train.recover import StopRequest
from ernie5.train.state import Progression


class StepSource(Protocol):
    """Where batches come from (data/loader.py)."""

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """Length of the run and the learning rate."""

    steps: int
    optim: OptimConfig
    progress: str = "auto"
    title: str = "train"


def run_steps(
    engine: Engine,
    *,
    data: StepSource,
    progression: Progression,
    hooks: Sequence[Hook],
    settings: LoopSettings,
    stop: StopRequest,
    rewind: Callable[[GoBack], None] | None = None,
) -> None:
    """Run steps until `settings.steps` are done; `rewind` restores an earlier state where a hook asks for it.

    Raises Interrupted after a signal, once a checkpoint is saved; errors of engine, data and hooks pass through.
    """
    mode = settings.progress if engine.is_main else "off"
    try:
        with Progress(settings.steps, title=settings.title, done=progression.step, mode=mode) as bar:
            while progression.step < settings.steps:
                context = _run_step(engine, data=data, progression=progression, hooks=hooks, settings=settings)
                try:
                    for hook in hooks:
                        hook.after_step(context)
                except GoBack as alarm:
                    _go_back(alarm, hooks=hooks, progression=progression, rewind=rewind)
                    bar.move_to(progression.step)
                    continue
                bar.advance(note=f"objective {float(context.report.sums.objective):.3f}")
                if not context.is_last and _must_stop(engine, stop=stop):
                    _interrupt(hooks, stop=stop, step=progression.step)
    except BaseException:
        for error in _finish(hooks):  # the error under way is the one to raise
            get_log().error("ending the run: %s", error)
        raise
    errors = _finish(hooks)
    if errors:
        raise errors[0]


def _finish(hooks: Sequence[Hook]) -> list[Exception]:
    """Finish every hook, whatever happens to the others; returns what went wrong."""
    errors = []
    for hook in hooks:
        try:
            hook.finish()
        except Exception as error:  # the caller raises or logs it, once all hooks are finished
            errors.append(error)
    return errors


def _go_back(
    alarm: GoBack, *, hooks: Sequence[Hook], progression: Progression, rewind: Callable[[GoBack], None] | None
) -> None:
    if rewind is None:
        raise NumericsError(f"{alarm}. This run has no way back")
    rewind(alarm)
    for hook in hooks:
        hook.go_back(progression.step)


def _run_step(
    engine: Engine, *, data: StepSource, progression: Progression, hooks: Sequence[Hook], settings: LoopSettings
) -> StepContext:
    started = time.perf_counter()
    batches = data.next_step()
    data_seconds = time.perf_counter() - started
    rate = learning_rate(progression.step, config=settings.optim, total_steps=settings.steps)
    sums = engine.accumulate(batches)
    is_dropped = any([hook.drops(sums) for hook in hooks])
    report = engine.discard(sums) if is_dropped else engine.update(sums, learning_rate=rate)
    progression.step += 1
    progression.tokens += int(report.sums.counts.tokens)
    progression.skipped_in_row = progression.skipped_in_row + 1 if report.skipped else 0
    return StepContext(
        step=progression.step,
        is_last=progression.step >= settings.steps,
        report=report,
        learning_rate=rate,
        seconds=time.perf_counter() - started,
        data_seconds=data_seconds,
    )


def _must_stop(engine: Engine, *, stop: StopRequest) -> bool:
    """True on every rank as soon as one of them has received a signal."""
    return engine.total(float(stop.requested)) > 0


def _interrupt(hooks: Sequence[Hook], *, stop: StopRequest, step: int) -> None:
    saved = [path for path in (hook.save_now() for hook in hooks) if path]
    cause = stop.name or "a signal on another rank"
    end = f"saved {saved[-1]}. The same command goes on from there" if saved else "not saved: the next start is anew"
    raise Interrupted(f"{cause} after step {step}; {end}")
