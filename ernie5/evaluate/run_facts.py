"""Reads a run directory for the report; parts that a run does not have stay empty."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

from ernie5.errors import DataError
from ernie5.evaluate.figures import EVALUATION_NAME, Evaluation, Timing, parse_evaluation
from ernie5.generate.manifest import MANIFEST_NAME, Gallery, load_gallery

METRICS_NAME = "metrics.jsonl"
TIMINGS_NAME = "timings.jsonl"
CONFIG_NAME = "config.yaml"
EMBEDDED_TOKENIZERS = Path(__file__).parents[1] / "tokenizers" / "embedded"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over steps, in the order of the file."""

    steps: tuple[float, ...] = ()
    values: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Quality:
    """Scalar figures that a tokenizer's training wrote beside its weights (quality.json), by name."""

    kind: str
    names: tuple[str, ...]
    values: tuple[float, ...]

    def series(self, word: str) -> tuple[tuple[str, float], ...]:
        """(number, value) of every figure whose name ends in `word` and a number, such as `psnr_scales_3`, in order."""
        pattern = re.compile(rf"(?:.*[_/])?{re.escape(word)}[_/](\d+)")
        found = [(pattern.fullmatch(name), value) for name, value in zip(self.names, self.values, strict=True)]
        numbered = [(match.group(1), value) for match, value in found if match]
        return tuple(sorted(numbered, key=lambda pair: int(pair[0])))


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """Everything the page shows; `curves` by metric name."""

    run_dir: Path
    curves: dict[str, Curve]
    config_text: str
    evaluation: Evaluation | None
    gallery: Gallery | None
    gallery_dir: Path | None
    qualities: tuple[Quality, ...]
    timings: tuple[Timing, ...]

    def curve(self, name: str) -> Curve:
        """The metric called `name`; empty where the run never logged it."""
        return self.curves.get(name, Curve())


def read_run(run_dir: Path) -> RunFacts:
    """Collect the facts of `run_dir`; raises DataError when it is no run directory or a file in it is damaged."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a directory. Name the train.run_dir of a run, for example runs/quickstart.")
    if not (run_dir / METRICS_NAME).is_file():
        raise DataError(
            f"{run_dir} holds no {METRICS_NAME}, so it is not the directory of a run. "
            "`ernie5 train CONFIG` makes one at train.run_dir."
        )
    config_path = run_dir / CONFIG_NAME
    evaluation_path = run_dir / EVALUATION_NAME
    evaluation = parse_evaluation(evaluation_path) if evaluation_path.is_file() else None
    gallery_dir = _newest_gallery(run_dir)
    gallery = load_gallery(gallery_dir) if gallery_dir else None
    curves = read_curves(run_dir / METRICS_NAME)
    return RunFacts(
        run_dir=run_dir,
        curves=curves,
        config_text=config_path.read_text(encoding="utf-8") if config_path.is_file() else "",
        evaluation=evaluation,
        gallery=gallery,
        gallery_dir=gallery_dir,
        qualities=_read_qualities(run_dir),
        timings=_timings(run_dir, curves=curves, evaluation=evaluation, gallery=gallery),
    )


def read_curves(path: Path) -> dict[str, Curve]:
    """Every finite metric of a metrics.jsonl; a step logged twice (a resumed run) keeps its last line.

    A last line cut short by a kill is ignored; damage anywhere else raises DataError with the line number.
    """
    rows: dict[tuple[str, float], float] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step = float(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not a metrics line ({error}). Delete that line.") from error
        for name, value in entry.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                rows[name, step] = float(value)
    gathered: dict[str, list[tuple[float, float]]] = {}
    for (name, step), value in rows.items():
        gathered.setdefault(name, []).append((step, value))
    return {name: Curve(*map(tuple, zip(*sorted(points)))) for name, points in gathered.items()}


def _newest_gallery(run_dir: Path) -> Path | None:
    """The gallery that was written last, wherever under RUN_DIR/samples it is."""
    found = list((run_dir / "samples").glob(f"**/{MANIFEST_NAME}"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def _read_qualities(run_dir: Path) -> tuple[Quality, ...]:
    """Tokenizers trained in this run come first; the embedded ones fill in."""
    qualities = []
    for kind in ("visual", "audio"):
        own = run_dir / "tokenizers" / kind
        places = (own / "export" / "quality.json", own / "quality.json", EMBEDDED_TOKENIZERS / kind / "quality.json")
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}. Train or restore that tokenizer.") from error
        pairs = tuple(_flatten(content))
        qualities.append(Quality(kind, tuple(name for name, _ in pairs), tuple(value for _, value in pairs)))
    return tuple(qualities)


def _flatten(content: object, prefix: str = "") -> list[tuple[str, float]]:
    """Numbers at any depth of JSON, lists counted from 1, names joined by '/'."""
    if isinstance(content, dict):
        return [pair for key, value in content.items() for pair in _flatten(value, f"{prefix}/{key}".lstrip("/"))]
    if isinstance(content, list):
        return [pair for i, value in enumerate(content, start=1) for pair in _flatten(value, f"{prefix}/{i}")]
    if isinstance(content, (int, float)) and not isinstance(content, bool) and math.isfinite(content):
        return [(prefix, float(content))]
    return []


def _timings(
    run_dir: Path, *, curves: dict[str, Curve], evaluation: Evaluation | None, gallery: Gallery | None
) -> tuple[Timing, ...]:
    """What timings.jsonl says (written by launch scripts), its two long parts split by what the other files measured;
    without it, those alone."""
    waited = sum(curves.get("data_seconds", Curve()).values)
    steps = sum(curves.get("step_seconds", Curve()).values)
    training = [Timing("optimizer steps", steps - waited), Timing("waiting for data", waited)]
    looking = []
    if evaluation is not None:
        looking.append(Timing("evaluation", sum(timing.seconds for timing in evaluation.timings)))
    if gallery is not None:
        looking.append(Timing("samples", gallery.seconds))
    path = run_dir / TIMINGS_NAME
    if not path.is_file():
        return tuple(timing for timing in (*training, *looking) if timing.seconds > 0)
    inside = {
        "pretrain": (training, "start, validation, checkpoints"),
        "evaluate and generate": (looking, "loading and writing"),
    }
    timings: list[Timing] = []
    for name, seconds in _logged_timings(path).items():
        parts, rest = inside.get(name, ([], name))
        timings += [*parts, Timing(rest, seconds - sum(part.seconds for part in parts))]
    return tuple(timing for timing in timings if timing.seconds > 0)


def _logged_timings(path: Path) -> dict[str, float]:
    """Seconds per name; a part that was started again counts all its lines."""
    totals: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            totals[entry["name"]] = totals.get(entry["name"], 0.0) + float(entry["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds a line that is no timing: {error}. Delete that line.") from error
    return totals
