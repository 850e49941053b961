"""The rows as JSON, as a Markdown table and as a picture of ratios."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from contest import Row
from measure import Device

matplotlib.use("Agg")
from matplotlib import pyplot  # the back end first

PANEL_LINES = 2  # what a panel's title takes beside its cases
TICKS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16)
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
    """A panel per operator, a line per case, a mark per peer at its time over ours."""
    ops = {op: [row for row in rows if row.op == op and any(row.ratios())] for op in dict.fromkeys(r.op for r in rows)}
    columns: tuple[list[str], list[str]] = ([], [])
    heights = [0, 0]
    for op in sorted((op for op in ops if ops[op]), key=lambda op: -len(ops[op])):
        side = heights.index(min(heights))
        columns[side].append(op)
        heights[side] += len(ops[op]) + PANEL_LINES
    if not columns[0]:
        return
    peers = list(dict.fromkeys(name for row in rows for name, _ in row.ratios()))
    colours = {peer: pyplot.colormaps["tab20"](n * 7 % 20) for n, peer in enumerate(peers)}
    figure = pyplot.figure(figsize=(15, 1 + 0.2 * max(heights)), layout="constrained")
    figure.suptitle(f"peer's time over ours on {device.name}: right of the line ours is faster", fontsize=11)
    for part, column in zip(figure.subfigures(1, 2), columns, strict=True):
        if column:
            panels = part.subplots(len(column), 1, squeeze=False, sharex=True,
                                   height_ratios=[len(ops[op]) + PANEL_LINES for op in column])[:, 0]
            for axes, op in zip(panels, column, strict=True):
                _panel(axes, rows=ops[op], colours=colours)
    marks = [pyplot.Line2D([], [], marker="o", linestyle="", color=colours[peer], label=peer) for peer in peers]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=8)
    figure.savefig(folder / "bench_gpu.png", dpi=90)
    pyplot.close(figure)


def _panel(axes: pyplot.Axes, *, rows: Sequence[Row], colours: Mapping[str, tuple[float, ...]]) -> None:
    for place, row in enumerate(rows):
        for name, ratio in row.ratios():
            axes.plot(ratio, place, "o", color=colours[name], markersize=5)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row.name.replace("forward + backward", "both ways") for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)
    axes.set_title(rows[0].op, fontsize=9, loc="left")
