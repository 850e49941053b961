"""Abnormal steps: NaN and loss spikes. An alarm names an action; the training loop carries it out."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from ernie5.observe.config import AlarmsConfig

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of a normal distribution times this is its standard deviation


@dataclasses.dataclass(frozen=True)
class Alarm:
    """kind: nan | spike | imbalance; action: warn | skip | rollback | stop; message: what happened, in one line."""

    kind: str
    action: str
    message: str


@dataclasses.dataclass(frozen=True)
class _Limit:
    """The largest normal loss, and how it came about."""

    loss: float
    text: str


class LossAlarm:
    """Watches the losses of the modalities in a step, each beside its own past (one may be absent from most steps, and
    a sum would rise whenever it is there), and the gradient norm. The state is the windows of recent losses."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._windows: dict[str, collections.deque[float]] = {}

    def check(self, losses: Mapping[str, float], *, grad_norm: float, step: int) -> Alarm | None:
        """The alarm of this step, if any. A spike enters its window too, so that a new level becomes normal."""
        if not all(map(math.isfinite, (*losses.values(), grad_norm))):
            told = ", ".join(f"{name} {loss}" for name, loss in losses.items())
            return Alarm("nan", self._config.on_nan, f"step {step}: loss {told}, gradient norm {grad_norm}: not finite")
        alarm = None
        for name, loss in losses.items():
            limit = self._limit(name)
            if alarm is None and loss > limit.loss:
                message = f"step {step}: loss of {name} {loss:.4g} is above {limit.text}"
                alarm = Alarm("spike", self._config.on_spike, message)
            self._window(name).append(loss)
        return alarm

    def is_spike(self, losses: Mapping[str, float]) -> bool:
        """Whether `check` would call one of `losses` a spike; changes nothing. What is not finite is no spike."""
        if not all(map(math.isfinite, losses.values())):
            return False
        return any(loss > self._limit(name).loss for name, loss in losses.items())

    def state(self) -> dict[str, list[float]]:
        """The windows, oldest first, for the checkpoint."""
        return {name: list(window) for name, window in self._windows.items()}

    def load_state(self, windows: Mapping[str, Sequence[float]]) -> None:
        """Restore what `state` gave."""
        self._windows.clear()
        for name, losses in windows.items():
            self._window(name).extend(float(loss) for loss in losses)

    def _window(self, name: str) -> collections.deque[float]:
        return self._windows.setdefault(name, collections.deque(maxlen=self._config.spike_window_steps))

    def _limit(self, name: str) -> _Limit:
        """The largest normal loss; infinite while the window is less than half full."""
        config, window = self._config, self._windows.get(name, ())
        if config.spike_deviations == 0 or len(window) < config.spike_window_steps // 2:
            return _Limit(math.inf, "")
        median = statistics.median(window)
        mad = statistics.median(abs(value - median) for value in window)
        spread = max(MAD_TO_SIGMA * mad, config.spike_floor * abs(median))
        limit = median + config.spike_deviations * spread
        return _Limit(
            limit,
            f"{limit:.4g} = median {median:.4g} + {config.spike_deviations:g} x spread {spread:.3g} of its last "
            f"{len(window)} steps",
        )


class LoadAlarm:
    """Warns when the fullest expert of some layer holds more than `load_ratio` times the mean load.

    Routers start uneven in every run, so it is silent during the first `load_grace` of `total_steps`, and afterwards
    says so at most once in `load_every_steps`.
    """

    def __init__(self, config: AlarmsConfig, *, total_steps: int) -> None:
        self._config = config
        self._next_step = math.floor(config.load_grace * total_steps) + 1

    def check(self, max_load_ratios: Sequence[float], *, step: int) -> Alarm | None:
        """The alarm of this step, if any; max_load_ratios: max/mean load per MoE layer, NaN where none was routed."""
        finite = [(ratio, layer) for layer, ratio in enumerate(max_load_ratios) if math.isfinite(ratio)]
        limit = self._config.load_ratio
        if limit == 0 or step < self._next_step or not finite or max(finite)[0] <= limit:
            return None
        self._next_step = step + self._config.load_every_steps
        ratio, layer = max(finite)
        return Alarm(
            "imbalance", "warn",
            f"step {step}: max/mean expert load {ratio:.2f} in MoE layer {layer} is above {limit:g}",
        )
