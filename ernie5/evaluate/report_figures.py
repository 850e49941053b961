"""Sections of the report that are made of numbers: It learns, curves, tokenizers, routing, time."""

from __future__ import annotations

import html
import math

from ernie5.evaluate import charts
from ernie5.evaluate.charts import Series
from ernie5.evaluate.figures import Figure, RoutingFigures
from ernie5.evaluate.run_facts import Curve, Quality, RunFacts

MODALITIES = ("text", "image", "video", "audio")
UNITS = {"text": "nats per token", "image": "nats per bit", "video": "nats per bit", "audio": "nats per code"}
COLORS = dict(zip(MODALITIES, charts.PALETTE))
GROUP_COLORS = charts.PALETTE


def figure_card(figure: Figure) -> str:
    """Value, baseline and verdict of one figure, both drawn as bars on one scale."""
    verdict, colour = ("beats it", "good") if figure.is_reached else ("not yet", "bad")
    if not figure.is_goal:
        verdict, colour = ("beats it, no goal here" if figure.is_reached else "no goal here"), "plain"
    chip = f'<span class="chip {colour}">{verdict}</span>'
    top = max(figure.value, figure.baseline, 1e-9)
    goal = "" if figure.goal is None else f" · goal {format_value(figure.goal, figure.unit)}"
    counted = {"bits per byte": "bytes", "x mean": "layers"}.get(figure.unit, "cases")
    better = "lower is better" if figure.lower_is_better else "higher is better"
    return (
        f'<div class="card"><div class="top"><h3>{html.escape(figure.title)}</h3>{chip}</div>'
        f'<div class="big">{format_value(figure.value, figure.unit)} <small>{_unit(figure.unit)}</small></div>'
        f'<div class="versus"><span>model</span><div><i style="width:{100 * figure.value / top:.1f}%"></i></div>'
        f"<em>{format_value(figure.value, figure.unit)}</em>"
        f'<span>{html.escape(figure.baseline_name)}</span><div class="base">'
        f'<i style="width:{100 * figure.baseline / top:.1f}%"></i></div>'
        f"<em>{format_value(figure.baseline, figure.unit)}</em></div>"
        f'<p class="note">{better}{goal} · {figure.samples:,} {counted}</p></div>'
    )


def _unit(unit: str) -> str:
    return "" if unit == "%" else html.escape(unit)


def format_value(value: float, unit: str) -> str:
    """A percentage with one digit, anything else with three significant ones."""
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def loss_charts(facts: RunFacts) -> str:
    """One card per modality: smoothed training loss, and validation losses."""
    cards = []
    for modality in MODALITIES:
        train = facts.curve(f"loss/{modality}")
        if not train.steps:
            continue
        color = COLORS[modality]
        series = [Series("training", train.steps, charts.smooth(train.values, half_life=len(train.steps) / 60), color)]
        validation = validation_curve(facts, modality)
        legend = _key("training, smoothed", color)
        if validation.steps:
            series.append(Series("validation", validation.steps, validation.values, "var(--ink)", is_marked=True))
            legend += _key(f"validation, last {validation.values[-1]:.3g}", "var(--ink)")
        drawn = charts.line_chart(series, unit=UNITS[modality])
        cards.append(_card(modality.capitalize(), body=f'{drawn}<div class="legend">{legend}</div>'))
    return f'<div class="grid two">{"".join(cards)}</div>' if cards else '<p class="empty">no losses yet</p>'


def validation_curve(facts: RunFacts, modality: str) -> Curve:
    """Validation losses of the run; of a run without any, the one of `ernie5 evaluate`."""
    curve = facts.curve(f"validation/loss/{modality}")
    if facts.evaluation is not None and not curve.steps:
        for loss in facts.evaluation.losses:
            if loss.modality == modality:
                return Curve((float(facts.evaluation.step),), (loss.nats,))
    return curve


def _card(title: str, *, body: str) -> str:
    return f'<div class="card"><h3>{html.escape(title)}</h3>{body}</div>'


def _key(name: str, color: str) -> str:
    return f'<span><b class="dot" style="background:{color}"></b>{html.escape(name)}</span>'


def health_charts(facts: RunFacts) -> str:
    """Learning rate, gradient norm, speed and expert load over the steps."""
    chosen = (
        ("tokens_per_second", "Throughput", "tokens/s"),
        ("grad_norm", "Gradient norm", ""),
        ("lr", "Learning rate", ""),
        ("moe/max_load_ratio", "Busiest expert over the mean", "x mean"),
    )
    cards = []
    for index, (name, title, unit) in enumerate(chosen):
        curve = facts.curve(name)
        if curve.steps:
            smooth = charts.smooth(curve.values, half_life=1e-6 if name == "lr" else len(curve.steps) / 80)
            drawn = charts.line_chart([Series(title, curve.steps, smooth, charts.PALETTE[index])], unit=unit)
            cards.append(f'<div class="card"><h3>{title}</h3>{drawn}</div>')
    return f'<div class="grid two below">{"".join(cards)}</div>'


def time_card(facts: RunFacts) -> str:
    """The split of the whole time."""
    total = sum(timing.seconds for timing in facts.timings)
    bar = charts.split_bar([(timing.name, timing.seconds) for timing in facts.timings], unit="s")
    return f'<div class="card"><h3>Where {format_seconds(total)} went</h3>{bar}</div>'


def format_seconds(seconds: float) -> str:
    """43 s, 9 min 12 s, 3 h 05 min."""
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def tokenizer_cards(qualities: tuple[Quality, ...]) -> str:
    """PSNR per scale count and log-mel distance per level, as the tokenizers' own training measured them."""
    cards = []
    for quality in qualities:
        charted = {
            "visual": (("scales", "Pictures: PSNR after 1 … S scales", "dB, higher is better"),),
            "audio": (
                ("log_mel_distance", "Speech: log-mel distance after 1 … Q levels", "nepers, lower is better"),
                ("stoi", "Speech: intelligibility after 1 … Q levels", "STOI, 1 is the original"),
            ),
        }[quality.kind]
        for word, title, unit in charted:
            found = quality.series(word)
            if found:
                color = charts.PALETTE[1 if quality.kind == "visual" else 3]
                drawn = charts.column_chart([v for _, v in found], labels=[k for k, _ in found], unit=unit, color=color)
                cards.append(f'<div class="card"><h3>{title}</h3>{drawn}</div>')
    return f'<div class="grid">{"".join(cards)}</div>' if cards else ""


def routing_section(routing: RoutingFigures) -> str:
    """Heat map of all tokens and of each group, entropy per layer, overlap of the busiest experts."""
    layers = [str(index) for index in range(len(routing.loads))]
    maps = [_heat_card("all tokens", routing.loads, layers)]
    maps += [_heat_card(name, loads, layers) for name, loads in zip(routing.groups, routing.group_loads)]
    places = tuple(float(index) for index in range(len(layers)))
    lines = [
        Series(name, places, values, GROUP_COLORS[index % len(GROUP_COLORS)])
        for index, (name, values) in enumerate(zip(routing.groups, routing.entropy))
    ]
    legend = "".join(
        f'<span><b class="dot" style="background:{line.color}"></b>{html.escape(line.name)} '
        f"<em>{sum(line.values) / max(len(line.values), 1):.2f}</em></span>"
        for line in lines
    )
    entropy = (
        f'<div class="card"><h3>Normalised entropy by layer</h3>{charts.line_chart(lines)}'
        f'<div class="legend">{legend}</div></div>'
    )
    ratios = charts.column_chart(routing.max_load_ratio, labels=layers, unit="busiest expert over the mean, by layer")
    load = _card("Load by layer", body=f'{ratios}<p class="note">{routing.dead_experts} dead experts</p>')
    tables = "".join(
        _overlap_card(layer, routing.groups, matrix) for layer, matrix in zip(routing.overlap_layers, routing.overlap)
    )
    return f'<div class="grid">{"".join(maps)}</div><div class="grid below">{entropy}{load}{tables}</div>'


def _heat_card(name: str, loads: tuple[tuple[float, ...], ...], layers: list[str]) -> str:
    return _card(name, body=charts.heat_map(loads, row_names=layers))


def _overlap_card(layer: int, groups: tuple[str, ...], matrix: tuple[tuple[float, ...], ...]) -> str:
    short = ["".join(part[0].upper() for part in name.replace("-", " ").split()) for name in groups]
    head = "".join(f"<th>{name}</th>" for name in short)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{'–' if math.isnan(value) else f'{value:.2f}'}</td>" for value in line)
        + "</tr>"
        for name, line in zip(groups, matrix)
    )
    return (
        f'<div class="card"><h3>Shared busy experts, layer {layer}</h3><div class="scroll"><table>'
        f"<tr><th>IoU of the top quarter</th>{head}</tr>{rows}</table></div></div>"
    )
