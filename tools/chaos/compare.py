"""Whether a run that was killed many times is the run that was not: every figure that does not depend on the clock."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

FIGURES = ("loss", "loss/text", "loss/mtp", "loss/objective", "grad_norm", "lr", "tokens", "moe/load_entropy",
           "moe/max_load_ratio", "moe/bias_spread")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """steps that both runs have once each; largest difference of any figure; the last step's loss of both."""

    steps: int
    divergence: float
    final_loss: float
    final_loss_whole: float


def compare(run_dir: Path, *, whole: Path) -> Comparison:
    """Raises ValueError unless both runs have the same steps, each once."""
    rows, expected = read(run_dir), read(whole)
    if [row["step"] for row in rows] != [row["step"] for row in expected]:
        raise ValueError(f"{run_dir} has steps {[row['step'] for row in rows]}, {whole} has {len(expected)} steps")
    largest = 0.0
    for row, other in zip(rows, expected, strict=True):
        for name in FIGURES:
            if (row[name] is None) != (other[name] is None):
                raise ValueError(f"step {row['step']}: {name} is {row[name]}, not {other[name]}")
            largest = max(largest, abs((row[name] or 0.0) - (other[name] or 0.0)))
    return Comparison(len(rows), largest, rows[-1]["loss"], expected[-1]["loss"])


def read(run_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
