"""The picture of a race: ratios to our step, and a bar per shape of where its CPU seconds go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from results import ShapeResult

matplotlib.use("Agg")
from matplotlib import pyplot  # the back end first


def draw(results: Sequence[ShapeResult], *, path: Path) -> None:
    """Write a PNG: above, times over ours; below, a stacked bar per shape, longest part first."""
    figure, axes = pyplot.subplots(
        2, 1, figsize=(10, 3 + 0.22 * sum(len(r.contestants) for r in results)), layout="constrained"
    )
    bars = [(f"{r.shape.name}: {c.name}", c.cpu_ratio) for r in results for c in r.contestants]
    axes[0].barh([name for name, _ in bars], [ratio for _, ratio in bars], color=[
        "#3b6fb6" if ": ours" in name else "#b9c3cf" for name, _ in bars
    ])
    axes[0].invert_yaxis()
    axes[0].axvline(1.0, color="black", linewidth=0.8)
    axes[0].set_xlabel("CPU seconds of a step, times ours in bf16")
    names = sorted({part for r in results for part in r.parts})
    colors = dict(zip(names, pyplot.get_cmap("tab20").colors, strict=False))
    labelled: set[str] = set()
    for result in results:
        left, whole = 0.0, sum(result.parts.values())
        for part, seconds in result.parts.items():
            label = None if part in labelled else part
            axes[1].barh(result.shape.name, seconds / whole, left=left, color=colors[part], label=label)
            labelled.add(part)
            left += seconds / whole
    axes[1].invert_yaxis()
    axes[1].set_xlabel("share of our step's CPU seconds")
    axes[1].legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))
    figure.savefig(path, dpi=120)
