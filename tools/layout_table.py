"""Run the layout table of tests/distributed, slow rows included, and write how far each row ended from one process.

    nice -n 5 .venv/bin/python tools/layout_table.py --out runs/layout_table [--steps 2 20] [--rows NAME ...]

Every finished row goes to steps-N.json at once; a second call runs what is missing. layout_table.md has a line per
row: after two steps, after twenty that replay the yardstick's choices (else the larger of both), and in float64.
Exit code 1 where a row is not within its tolerances."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "distributed"))
sys.path.append(str(Path(__file__).with_name("bench_peers")))

from arguments import folder
from layout_compare import SCORE_GAP, compare
from layout_jobs import Layouts
from layout_rows import LONG_STEPS, ROWS, STEPS, Row, Tolerances

KINDS = [field.name for field in dataclasses.fields(Tolerances)]
HEAD = ("row", "ranks", "engine", "gradients", "norms", "losses", "movement", f"movement, {LONG_STEPS} steps",
        "other choices", "float64", "verdict")
LIMIT_SECONDS = 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=folder, required=True, help="folder for results")
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS, LONG_STEPS], choices=[STEPS, LONG_STEPS])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, found = sorted((ROWS[name] for name in options.rows), key=lambda row: row.ranks), {}
    for steps in options.steps:
        (place := options.out / f"steps-{steps}").mkdir(parents=True, exist_ok=True)
        path = place.with_suffix(".json")
        done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        # in float64 two steps show that nothing but rounding is left
        missing = [row for row in rows if row.name not in done and (steps == STEPS or row.precision != "fp64")]
        layouts = Layouts(place, wanted=missing, steps=steps, limit_seconds=LIMIT_SECONDS)
        for row in missing:
            done[row.name] = run(row, layouts=layouts)
            print(f"{row.name}, {steps} steps: {'; '.join(done[row.name]['complaints']) or 'equal'}", flush=True)
            path.write_text(json.dumps(done, indent=1), encoding="utf-8")
        found[steps] = done
    (options.out / "layout_table.md").write_text(table(found), encoding="utf-8")
    return int(any(entry["complaints"] for done in found.values() for entry in done.values()))


def run(row: Row, *, layouts: Layouts) -> dict[str, object]:
    """Largest differences of a row, where they are, and what is beyond the tolerances."""
    entry: dict[str, object] = {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    try:
        differences = compare(layouts.result(row), expected=layouts.result(row.yardstick()), row=row)
    except RuntimeError as error:
        return {**entry, "complaints": [str(error)]}
    complaints = differences.complaints(row.tolerances)
    if row.precision != "bf16":
        complaints += [f"{one} is no rounding" for one in differences.first if not one.gap < SCORE_GAP]
    worst = {name: vars(vars(differences)[name]) for name in (*KINDS, "parameters")}
    first, gap = [vars(one) for one in differences.first], max((one.gap for one in differences.first), default=0.0)
    found = {"divergences": differences.divergences, "first": first, "gap": gap, "complaints": complaints}
    return entry | worst | found


def table(found: dict[int, dict[str, dict]]) -> str:
    """Markdown, a line per row that ran."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    after_two, after_many = (found.get(steps, {}) for steps in (STEPS, LONG_STEPS))
    for name, row in ROWS.items():
        entries = after_two.get(name), after_many.get(name), after_two.get(f"{name}-fp64")
        if row.precision != "fp64" and any(entries):
            lines.append(f"| {' | '.join(line(row, *entries))} |")
    return "\n".join(lines) + "\n"


def line(row: Row, short: dict | None, long: dict | None, double: dict | None) -> list[str]:
    """The cells of one row."""
    def cell(entries: list[dict | None], *kinds: str) -> str:
        values = [entry[kind]["value"] for entry in entries if entry for kind in kinds if kind in entry]
        return f"{max(values):.0e}" if values else ""

    others = f"{long['divergences']}, gap {long['gap']:.0e}" if long and long.get("divergences") else ""
    complaints = "; ".join(words for entry in (short, long, double) if entry for words in entry["complaints"])
    return [row.name, str(row.ranks), "grid" if row.stage is None else f"ZeRO-{row.stage}",
            *(cell([short, long], kind) for kind in HEAD[3:6]), cell([short], "movement"), cell([long], "movement"),
            others, cell([double], *KINDS), complaints.replace("\n", " ")[:200] or "equal"]


if __name__ == "__main__":
    sys.exit(main())
