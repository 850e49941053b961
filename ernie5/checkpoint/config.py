"""Settings of saving."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import field, non_negative, positive

FORMATS = ("ernie5", "deepspeed")


@config
class CheckpointConfig(Config):
    """When and where checkpoints are written, and how many stay."""

    every_steps: int = field(
        100, doc="distance between checkpoints; 0 saves only at the end and on interruption", unit="steps",
        check=non_negative, kind="logging",
    )
    asynchronous: bool = field(
        True, doc="write behind the training: it waits until values on a GPU are in CPU memory and others in the page "
        "cache of the file; false: wait for the disk", kind="performance",
    )
    replica_every_steps: int = field(
        1, doc="distance between copies in shared memory, which launch/supervise.py keeps; 0: none", unit="steps",
        check=non_negative, kind="performance",
    )
    format: str = field(
        "ernie5", doc="ernie5: any layout reads it; deepspeed: beside it, in DIR/deepspeed, DeepSpeed's own files, "
        "for whoever has tools for those; runs go on from the former", choices=FORMATS,
        kind="logging",
    )
    dir: str | None = field(
        None, doc="directory of the checkpoints; none: RUN_DIR/checkpoints", kind="logging", is_path=True
    )
    keep: int = field(2, doc="newest checkpoints that stay on disk", unit="checkpoints", check=positive,
                      kind="logging")
    keep_every_steps: int = field(
        0, doc="checkpoints at multiples of this stay for good; 0: none", unit="steps", check=non_negative,
        kind="logging",
    )
