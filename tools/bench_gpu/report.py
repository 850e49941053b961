"""The rows as JSON, as a Markdown table and as a picture of ratios."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from contest import Row
from measure import Device

matplotlib.use("Agg")
from matplotlib import pyplot  # the back end first

HEADS = ("op", "case", "ms", "rate", "of the device", "host us", "peers: ms (over ours)", "difference", "errors")


def write(rows: Sequence[Row], *, device: Device, folder: Path) -> None:
    """Write bench_gpu.json, bench_gpu.md and bench_gpu.png."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "date": time.strftime("%Y-%m-%d %H:%M"), "device": dataclasses.asdict(device),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (folder / "bench_gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [describe(device), "", head(), *(line(row) for row in rows)]
    (folder / "bench_gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def describe(device: Device) -> str:
    """One sentence on where and against what."""
    return (
        f"{time.strftime('%Y-%m-%d')}, {device.name} ({device.memory_gib} GiB), driver {device.driver}, CUDA "
        f"{device.cuda}, torch {device.torch}, triton {device.triton}; in this run bf16 8192^3 at "
        f"{device.bf16_tflops:.0f} TFLOP/s, a copy at {device.copy_gbs:.0f} GB/s, an empty graph "
        f"{device.floor_ms:.4f} ms."
    )


def head() -> str:
    """The table's first two lines."""
    return "| " + " | ".join(HEADS) + " |\n|" + " --- |" * len(HEADS)


def line(row: Row) -> str:
    """One line of the table."""
    ratios = dict(row.ratios())
    peers = ", ".join(
        f"{name} {ms:.3f}" + (f" ({ratios[name]:.2f})" if name in ratios else "") for name, ms in row.peers_ms.items()
    )
    cells = (
        row.op, row.name, f"{row.ours_ms:.4f}{'' if row.graphed else ' (no graph)'}" if row.ours_ms else "-",
        f"{row.rate:.0f} {row.unit}" if row.rate else "-", f"{row.share:.0%}" if row.share else "-",
        f"{row.host_us:.0f}" if row.host_us else "-", peers or "-",
        "-" if row.difference is None else f"{row.difference:.1e}", "; ".join(row.errors).replace("|", "/") or "",
    )
    return "| " + " | ".join(cells) + " |"


def draw(rows: Sequence[Row], *, device: Device, folder: Path) -> None:
    """Each peer's time over ours."""
    bars = [(f"{row.op}: {row.name}", name, ratio) for row in rows for name, ratio in row.ratios()]
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(13, 1 + 0.22 * len(bars)), layout="constrained")
    axes.barh([f"{case} | {peer}" for case, peer, _ in bars], [ratio for _, _, ratio in bars], color="#3b6fb6")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 4)
    axes.set_xlabel(f"peer's time over ours on {device.name}: right of the line ours is faster")
    figure.savefig(folder / "bench_gpu.png", dpi=110)
    pyplot.close(figure)
