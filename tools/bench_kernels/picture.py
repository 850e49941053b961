"""The picture of the kernels' races."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # the back end first


def draw(ratios: Sequence[tuple[str, float]], *, path: Path) -> None:
    """Write a PNG of (name, other's CPU seconds over ours)."""
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.25 * len(ratios)), layout="constrained")
    axes.barh([name for name, _ in ratios], [ratio for _, ratio in ratios], color="#3b6fb6")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("other's CPU seconds over ours: right of the line ours is faster")
    figure.savefig(path, dpi=120)
