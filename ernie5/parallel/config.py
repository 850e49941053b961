"""Parallel degrees. This version runs data parallelism; the other axes are named and refused."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import field, positive
from ernie5.errors import LayoutError

UNAVAILABLE_AXES = ("tp", "ep", "etp", "pp", "vpp", "cp")


@config
class ParallelConfig(Config):
    """Number of ranks along each axis of the grid."""

    dp: int | None = field(
        None, doc="data-parallel ranks; none: derived from the number of processes", check=positive, kind="derived"
    )
    tp: int = field(1, doc="tensor-parallel ranks", check=positive, kind="performance")
    ep: int = field(1, doc="expert-parallel ranks", check=positive, kind="performance")
    etp: int = field(1, doc="tensor-parallel ranks inside an expert", check=positive, kind="performance")
    pp: int = field(1, doc="pipeline stages", check=positive, kind="performance")
    vpp: int = field(1, doc="virtual stages per pipeline rank", check=positive, kind="performance")
    cp: int = field(1, doc="context-parallel ranks", check=positive, kind="performance")

    def validate(self) -> None:
        """Refuse the axes that this version cannot run, instead of ignoring them."""
        for axis in UNAVAILABLE_AXES:
            if getattr(self, axis) > 1:
                self.fail(
                    axis,
                    "this axis is not available in this version; only data parallelism (dp) runs beyond one process. "
                    f"Set parallel.{axis}: 1",
                    error=LayoutError,
                )
