"""Where figures go: metrics.jsonl and the log always, TensorBoard and Weights & Biases on request. Their one home."""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import os
import types
from pathlib import Path

from ernie5.errors import EnvironmentFault
from ernie5.observe.config import ObserveConfig
from ernie5.observe.faults import refusal_of
from ernie5.observe.log import get_log


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """The figures of one optimizer step as Python numbers, in order."""

    step: int
    names: tuple[str, ...]
    values: tuple[float | int, ...]

    def value(self, name: str) -> float | int:
        """One figure. Raises ValueError where the step has none of that name."""
        return self.values[self.names.index(name)]


class Sink(abc.ABC):
    """One destination of figures."""

    @abc.abstractmethod
    def write(self, row: MetricRow) -> None:
        """Write one step."""

    @abc.abstractmethod
    def go_back(self, step: int) -> None:
        """Hide what was written for the steps after `step`: they come again."""

    @abc.abstractmethod
    def close(self) -> None:
        """Finish writing."""


class JsonlSink(Sink):
    """One JSON object per step, appended to a file and safe to resume after a kill at any moment.

    `last_step` is the step that the run resumes from (0 for a fresh run): later lines, which a killed run wrote after
    its last checkpoint, are dropped first, and so is a torn last line; the file is replaced atomically.
    """

    def __init__(self, path: Path, *, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        keep_until_step(path, last_step=last_step)
        self._path, self._file = path, open(path, "a", encoding="utf-8")

    def write(self, row: MetricRow) -> None:
        """Append a line. Numbers have full precision; what is not finite becomes null, which is valid JSON."""
        values = {name: _json_number(value) for name, value in zip(row.names, row.values, strict=True)}
        self._file.write(json.dumps({"step": row.step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps; the file is replaced, so it is opened anew."""
        self._file.close()
        keep_until_step(self._path, last_step=step)
        self._file = open(self._path, "a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardSink(Sink):
    """TensorBoard events; steps after `last_step` of an earlier run are hidden by its purge mark."""

    def __init__(self, folder: Path, *, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._folder, self._open = folder, SummaryWriter
        self._writer = self._start(last_step)

    def write(self, row: MetricRow) -> None:
        """Add one scalar per figure. Raises EnvironmentFault where its folder cannot be written to any more."""
        try:
            for name, value in zip(row.names, row.values, strict=True):
                self._writer.add_scalar(name, value, global_step=row.step)
        except OSError as error:  # of the thread that writes, some steps later
            raise EnvironmentFault(f"writing to {self._folder} failed: {refusal_of(error)}.") from error

    def go_back(self, step: int) -> None:
        """A new file whose purge mark hides the later steps."""
        self._writer.close()
        self._writer = self._start(step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()

    def _start(self, last_step: int) -> object:
        purge = last_step + 1 if last_step else None
        return self._open(log_dir=str(self._folder), purge_step=purge, flush_secs=30)


class WandbSink(Sink):
    """Weights & Biases; the run directory's name is the run's id, so that a resumed run goes on in the same place."""

    def __init__(self, run_dir: Path, *, project: str) -> None:
        self._run = _import_wandb().init(project=project, id=run_dir.resolve().name, resume="allow", dir=str(run_dir))

    def write(self, row: MetricRow) -> None:
        """Send one step."""
        self._run.log(dict(zip(row.names, row.values, strict=True)), step=row.step)

    def go_back(self, step: int) -> None:
        """Weights & Biases keeps the first value of a step: the later steps show what was undone until it is passed."""

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


class LogSink(Sink):
    """A line of the log for every `every`-th step and for the last one, `steps`."""

    def __init__(self, *, every: int, steps: int) -> None:
        self._every, self._steps = every, steps

    def write(self, row: MetricRow) -> None:
        """Say it, if it is one of those steps."""
        if row.step % self._every == 0 or row.step == self._steps:
            get_log().info(
                "step %d: loss %.4f, gradient norm %.3f, %.0f tokens/s",
                row.step, row.value("loss"), row.value("grad_norm"), row.value("tokens_per_second"),
            )

    def go_back(self, step: int) -> None:
        """What was said stays."""

    def close(self) -> None:
        """Nothing is left to say."""


def check_sinks(config: ObserveConfig) -> None:
    """Raise EnvironmentFault where a sink lacks its package: before an earlier run's figures are cleared or cut."""
    if config.wandb:
        _import_wandb()


def _import_wandb() -> types.ModuleType:
    try:
        import wandb
    except ImportError:
        raise EnvironmentFault(
            "observe.wandb = true, but the package wandb is not installed. Install it with `pip install wandb`, "
            "or set observe.wandb=false."
        ) from None
    return wandb


def open_sinks(config: ObserveConfig, *, run_dir: Path, steps: int, last_step: int = 0) -> tuple[Sink, ...]:
    """All sinks of a run of `steps` that resumes after `last_step` (0: fresh). Call on one rank only."""
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl", last_step=last_step)]
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", last_step=last_step))
    if config.wandb:
        sinks.append(WandbSink(run_dir, project=config.wandb_project))
    sinks.append(LogSink(every=config.log_every_steps, steps=steps))
    return tuple(sinks)


def keep_until_step(path: Path, *, last_step: int) -> None:
    """Atomically drop the lines of a jsonl file whose step exceeds `last_step`, and, which is said, lines that are not
    JSON objects: a kill tore them."""
    if not path.exists():
        return
    before = path.read_text(encoding="utf-8", errors="replace")
    lines = [(line, _line_step(line)) for line in before.splitlines()]
    torn = [str(number) for number, (_, step) in enumerate(lines, start=1) if step == math.inf]
    if torn:
        get_log().warning(
            "%s: row %s is torn, as a kill may leave it, and is dropped. The run goes on after step %d and writes the "
            "later rows anew", path, ", ".join(torn), last_step,
        )
    after = "".join(line + "\n" for line, step in lines if step <= last_step)
    if after == before:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(path: Path) -> tuple[MetricRow, ...]:
    """The rows of a metrics.jsonl; a torn last line is left out, null comes back as NaN."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if _line_step(line) == math.inf:
            continue
        values = {name: math.nan if value is None else value for name, value in json.loads(line).items()}
        step = int(values.pop("step"))
        rows.append(MetricRow(step, tuple(values), tuple(values.values())))
    return tuple(rows)


def _line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _json_number(value: float | int) -> float | int | None:
    return value if math.isfinite(value) else None
