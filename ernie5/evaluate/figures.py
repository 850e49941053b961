"""What an evaluation found, as dataclasses and as JSON: evaluation.json, read again by the report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ernie5.errors import DataError

EVALUATION_NAME = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of "It learns" beside its baseline.

    key: stable name; unit: what the value counts; lower_is_better: the direction; goal: the value to reach, where one
    is set beyond the baseline; samples: how many cases stand behind the value; is_goal: whether the run is judged by
    it, or only measured.
    """

    key: str
    title: str
    value: float
    baseline: float
    baseline_name: str
    unit: str
    lower_is_better: bool
    samples: int
    goal: float | None = None
    is_goal: bool = True

    @property
    def is_reached(self) -> bool:
        """Whether the value beats its baseline and, where there is one, its goal."""
        sign = -1.0 if self.lower_is_better else 1.0
        return sign * self.value > sign * self.baseline and (self.goal is None or sign * self.value >= sign * self.goal)


@dataclasses.dataclass(frozen=True)
class RoutingFigures:
    """Routing over the validation samples; groups are TokenKind 1..6 by name, absent groups left out.

    loads[l][e]: part of the mean load (1 = even); group_loads[g][l][e] likewise; entropy[g][l]: normalised entropy
    NE = -sum p log p / log E (SPEC section 5); overlap[l][g][g']: IoU of the top quarter of experts, for the first,
    the middle and the last layer.
    """

    groups: tuple[str, ...]
    loads: tuple[tuple[float, ...], ...]
    group_loads: tuple[tuple[tuple[float, ...], ...], ...]
    entropy: tuple[tuple[float, ...], ...]
    overlap: tuple[tuple[tuple[float, ...], ...], ...]
    overlap_layers: tuple[int, ...]
    max_load_ratio: tuple[float, ...]
    dead_experts: int


@dataclasses.dataclass(frozen=True)
class Loss:
    """Mean validation loss of one modality in nats per target, over `targets` targets."""

    modality: str
    nats: float
    targets: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long one part took."""

    name: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that `ernie5 evaluate` prints. skipped: why a part was left out, in words."""

    checkpoint: str
    step: int
    losses: tuple[Loss, ...]
    figures: tuple[Figure, ...]
    routing: RoutingFigures | None
    timings: tuple[Timing, ...]
    skipped: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One JSON object; `losses` and `figures` are objects by name so that scripts can pick them."""
        content = {
            "checkpoint": self.checkpoint,
            "step": self.step,
            "losses": {loss.modality: loss.nats for loss in self.losses},
            "loss_targets": {loss.modality: loss.targets for loss in self.losses},
            "figures": {f.key: {**dataclasses.asdict(f), "is_reached": f.is_reached} for f in self.figures},
            "routing": None if self.routing is None else dataclasses.asdict(self.routing),
            "timings": {timing.name: timing.seconds for timing in self.timings},
            "skipped": list(self.skipped),
        }
        return json.dumps(content, ensure_ascii=False, indent=1)


def parse_evaluation(path: Path) -> Evaluation:
    """Read what `to_json` wrote; raises DataError for a file that is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(Figure)}
        figures = [Figure(**{k: v for k, v in entry.items() if k in names}) for entry in content["figures"].values()]
        routing = content["routing"] and RoutingFigures(**{k: _frozen(v) for k, v in content["routing"].items()})
        return Evaluation(
            checkpoint=content["checkpoint"],
            step=content["step"],
            losses=tuple(Loss(name, nats, content["loss_targets"][name]) for name, nats in content["losses"].items()),
            figures=tuple(figures),
            routing=routing or None,
            timings=tuple(Timing(name, seconds) for name, seconds in content["timings"].items()),
            skipped=tuple(content["skipped"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not an evaluation: {error}. Run `ernie5 evaluate` again.") from error


def _frozen(value: object) -> object:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
