"""Abnormal steps: NaN and loss spikes. An alarm names an action; the training loop carries it out."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence

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
    """Watches loss and gradient norm, one step after another; the state is the window of recent losses."""

    def __init__(self, config: AlarmsConfig) -> None:
        self._config = config
        self._window: collections.deque[float] = collections.deque(maxlen=config.spike_window_steps)

    def check(self, loss: float, *, grad_norm: float, step: int) -> Alarm | None:
        """The alarm of this step, if any. A spike enters the window too, so that a new level becomes normal."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Alarm("nan", self._config.on_nan, f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite")
        limit = self._limit()
        alarm = None if loss <= limit.loss else Alarm(
            "spike", self._config.on_spike, f"step {step}: loss {loss:.4g} is above {limit.text}"
        )
        self._window.append(loss)
        return alarm

    def is_spike(self, loss: float) -> bool:
        """Whether `check` would call `loss` a spike; changes nothing. What is not finite is no spike."""
        return math.isfinite(loss) and loss > self._limit().loss

    def state(self) -> list[float]:
        """The window, oldest first, for the checkpoint."""
        return list(self._window)

    def load_state(self, window: Sequence[float]) -> None:
        """Restore what `state` gave."""
        self._window.clear()
        self._window.extend(float(loss) for loss in window)

    def _limit(self) -> _Limit:
        """The largest normal loss; infinite while the window is less than half full."""
        config = self._config
        if config.spike_deviations == 0 or len(self._window) < config.spike_window_steps // 2:
            return _Limit(math.inf, "")
        median = statistics.median(self._window)
        mad = statistics.median(abs(value - median) for value in self._window)
        spread = max(MAD_TO_SIGMA * mad, config.spike_floor * abs(median))
        limit = median + config.spike_deviations * spread
        return _Limit(
            limit,
            f"{limit:.4g} = median {median:.4g} + {config.spike_deviations:g} x spread {spread:.3g} of the last "
            f"{len(self._window)} steps",
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
