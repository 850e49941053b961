"""Small inline SVG charts whose colours follow the page's CSS variables, so that dark mode needs no second picture."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

TOP = 20  # above it stands the unit
PALETTE = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)", "var(--c6)")


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart: places and values of equal length, a colour, and whether it is drawn dashed with dots."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    color: str = PALETTE[0]
    is_marked: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """The drawing area in SVG units and the data window that it shows."""

    width: float
    height: float
    left: float
    bottom: float
    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Data -> SVG units."""
        across = (x - self.low_x) / max(self.high_x - self.low_x, 1e-12)
        upward = (y - self.low_y) / max(self.high_y - self.low_y, 1e-12)
        y = (self.height - self.bottom) * (1 - upward) + TOP * upward
        return self.left + across * (self.width - self.left - 12), y


def smooth(values: Sequence[float], *, half_life: float) -> tuple[float, ...]:
    """Bias-corrected exponential mean; `half_life` in points."""
    decay = 0.5 ** (1.0 / max(half_life, 1e-6))
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        result.append(total / weight)
    return tuple(result)


def nice_ticks(low: float, *, high: float, count: int = 5) -> tuple[float, ...]:
    """Round numbers that cover low .. high in about `count` steps of 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def short_number(value: float) -> str:
    """A number a reader takes in at a glance: 12.3k, 4.5M, 0.034."""
    size = abs(value)
    for limit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if name == 'k' else limit):.3g}{name}"
    if size >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"


def line_chart(series: Sequence[Series], *, width: int = 420, height: int = 220, unit: str = "") -> str:
    """Lines over steps with a quiet grid; points that are not finite are left out."""
    points = [(x, y) for line in series for x, y in zip(line.steps, line.values) if math.isfinite(y)]
    if not points:
        return '<p class="empty">no figures yet</p>'
    low_y, high_y = _window([y for _, y in points])
    frame = Frame(width, height, 44, 26, min(x for x, _ in points), max(x for x, _ in points), low_y, high_y)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">']
    for tick in nice_ticks(low_y, high=high_y):
        _, y = frame.place(frame.low_x, tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{width - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_tick(frame.left - 7, y + 3.5, text=short_number(tick), anchor="end"))
    for tick in nice_ticks(frame.low_x, high=frame.high_x, count=6):
        x, _ = frame.place(tick, low_y)
        parts.append(_tick(x, height - 8, text=short_number(tick)))
    parts.extend(_draw_line(line, frame=frame) for line in series)
    if unit:
        parts.append(f'<text class="tick" x="2" y="10">{html.escape(unit)}</text>')
    return "".join(parts) + "</svg>"


def _tick(x: float, y: float, *, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _window(values: list[float]) -> tuple[float, float]:
    """Value range to show: the first steps of a loss tower over the rest, so the top 1 % may leave the picture."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    margin = (high - low) * 0.06 or max(abs(high), 1.0) * 0.05
    return low - margin, high + margin


def _draw_line(line: Series, *, frame: Frame) -> str:
    places = [frame.place(x, min(y, frame.high_y)) for x, y in zip(line.steps, line.values) if math.isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="2 4"' if line.is_marked else ""
    drawn = f'<polyline class="line" style="stroke:{line.color}" points="{path}"{dash}/>'
    if line.is_marked or len(places) == 1:
        drawn += "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{line.color}"/>' for x, y in places)
    return drawn


def heat_map(values: Sequence[Sequence[float]], *, row_names: Sequence[str], cell_width: float = 13.0) -> str:
    """Rows of cells, 1 = the mean load, each with its value as a title text."""
    if not values or not values[0]:
        return '<p class="empty">no routing figures yet</p>'
    left, cell_height = 24.0, 15.0
    cell = min(cell_width, 372.0 / len(values[0]))
    width, height = left + cell * len(values[0]) + 2, cell_height * len(values) + 4
    parts = [f'<svg class="heat" viewBox="0 0 {width:.0f} {height:.0f}" role="img">']
    for row, (name, line) in enumerate(zip(row_names, values)):
        y = row * cell_height + 2
        parts.append(_tick(left - 6, y + 10.5, text=name, anchor="end"))
        for column, value in enumerate(line):
            parts.append(
                f'<rect x="{left + column * cell:.2f}" y="{y:.1f}" width="{cell - 1:.2f}" height="{cell_height - 1}" '
                f'rx="2" style="{_heat_style(value)}"><title>layer {html.escape(name)}, expert {column}: '
                f"{value:.2f} x mean</title></rect>"
            )
    return "".join(parts) + "</svg>"


def _heat_style(value: float) -> str:
    """Diverging: pale at the mean, fully blue at a quarter of it or less, fully warm at four times."""
    doublings = math.log2(max(value, 2.0**-8))
    color = "var(--heat)" if doublings > 0 else "var(--c1)"
    return f"fill:{color};fill-opacity:{0.07 + 0.93 * min(abs(doublings) / 2.0, 1.0):.2f}"


def split_bar(parts: Sequence[tuple[str, float]], *, unit: str) -> str:
    """One stacked bar with a legend below; parts are (name, amount)."""
    total = sum(amount for _, amount in parts)
    if total <= 0:
        return '<p class="empty">no timings yet</p>'
    bar, legend = [], []
    for index, (name, amount) in enumerate(parts):
        color = PALETTE[index % len(PALETTE)]
        bar.append(f'<i style="width:{100 * amount / total:.2f}%;background:{color}"></i>')
        legend.append(
            f'<span><b class="dot" style="background:{color}"></b>{html.escape(name)} '
            f"<em>{short_number(amount)} {unit}</em></span>"
        )
    return f'<div class="split">{"".join(bar)}</div><div class="legend">{"".join(legend)}</div>'


def column_chart(values: Sequence[float], *, labels: Sequence[str], unit: str, color: str = PALETTE[0]) -> str:
    """A few labelled columns, each with its value on top."""
    if not values:
        return '<p class="empty">no figures yet</p>'
    width, height, top = 320.0, 182.0, max(max(values), 1e-12)
    step = (width - 16) / len(values)
    parts = [f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" role="img">']
    for index, (value, label) in enumerate(zip(values, labels)):
        tall = (height - 66) * max(value, 0.0) / top
        x = 8 + index * step
        middle = x + step / 2
        parts.append(
            f'<rect x="{x + step * 0.18:.1f}" y="{height - 24 - tall:.1f}" width="{step * 0.64:.1f}" '
            f'height="{max(tall, 1):.1f}" rx="4" style="fill:{color};fill-opacity:.85"/>'
            f'<text class="value" x="{middle:.1f}" y="{height - 30 - tall:.1f}" text-anchor="middle">'
            f'{short_number(value)}</text>'
            f'<text class="tick" x="{middle:.1f}" y="{height - 8:.1f}" text-anchor="middle">{html.escape(label)}</text>'
        )
    parts.append(f'<text class="tick" x="8" y="12">{html.escape(unit)}</text>')
    return "".join(parts) + "</svg>"
