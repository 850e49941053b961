"""Settings of metrics, sinks and alarms; torch-free."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import at_least, field, fraction, non_negative, positive


@config
class AlarmsConfig(Config):
    """When a step counts as abnormal, and what the run does about it."""

    spike_window_steps: int = field(
        64, doc="steps whose median and spread define a normal loss", unit="steps", check=at_least(8), kind="numerics"
    )
    spike_deviations: float = field(
        8.0, doc="robust deviations (1.4826 x MAD) above the median that make a spike; 0 switches it off",
        check=non_negative, kind="numerics",
    )
    spike_floor: float = field(
        0.02, doc="smallest spread as a share of the median, so that a flat curve does not alarm", check=fraction,
        kind="numerics",
    )
    on_spike: str = field(
        "warn", doc="warn: say it; skip: drop the update; rollback: return to the last good checkpoint and leave out "
        "the data since; stop: end with exit code 4; skip and rollback at most train.spike_retries times in a row",
        choices=("warn", "skip", "rollback", "stop"), kind="numerics",
    )
    on_nan: str = field(
        "skip", doc="as on_spike; what is not finite is never applied", choices=("skip", "rollback", "stop"),
        kind="numerics",
    )
    load_ratio: float = field(
        4.0, doc="max/mean expert load of a layer above which a warning is logged; 0 switches it off",
        check=non_negative, kind="logging",
    )
    load_grace: float = field(
        0.1, doc="first share of the run in which uneven expert loads are normal and not warned of", check=fraction,
        kind="logging",
    )
    load_every_steps: int = field(
        100, doc="smallest distance between two warnings of expert load", unit="steps", check=positive, kind="logging"
    )


@config
class ObserveConfig(Config):
    """How often and where the figures of a run are written."""

    flush_every_steps: int = field(
        1, doc="steps whose figures stay on the device before they are read and written", unit="steps",
        check=positive, kind="performance",
    )
    log_every_steps: int = field(
        10, doc="distance between lines of the log", unit="steps", check=positive, kind="logging"
    )
    tensorboard: bool = field(True, doc="write TensorBoard events to RUN_DIR/tensorboard", kind="logging")
    wandb: bool = field(False, doc="send the figures to Weights & Biases; needs the package wandb", kind="logging")
    wandb_project: str = field("ernie5", doc="project name there", kind="logging")
    progress: str = field(
        "auto", doc="progress bars; auto: only where stderr is a terminal", choices=("auto", "on", "off"),
        kind="logging",
    )
    peak_tflops: float | None = field(
        None, doc="rate of one device that mfu is relative to; null: a matrix product measured at start",
        unit="TFLOP/s", check=positive, kind="logging",
    )
    alarms: AlarmsConfig = field(AlarmsConfig, doc="NaN, spikes, imbalance", kind="numerics")
