"""Train a configuration with one design part at a time switched off, and compare on validation data.

    .venv/bin/python tools/ablate.py configs/pretrain/quickstart.yaml --out runs/ablation [--steps 200] [a.b=c ...]

Every variant has the same seed, data stream and steps, and is evaluated by the same command; the table (Markdown) goes
to stdout and to OUT/table.md. A variant that is finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VARIANTS = {
    "as configured": (),
    "no balance bias": ("model.moe.balance.speed=0",),
    "no MTP": ("model.mtp.depth=0",),
    "no corruption": ("data.corruption.enabled=false",),
}
COLUMNS = {
    "text_bits_per_byte_order2": "text, bits/byte",
    "text_to_image_nearest": "picture nearer its target",
    "video_next_frame_bits": "next-frame bits right",
    "audio_to_text_loss": "speech to text, nats/token",
    "expert_load": "busiest expert / mean",
}


def main() -> int:
    """Train, evaluate and tabulate every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--steps", type=int, help="train.steps of every variant")
    parser.add_argument("--jobs", type=int, default=1, help="variants at a time, one thread each (default: 1)")
    parser.add_argument("overrides", nargs="*", help="a.b=c, for every variant")
    options = parser.parse_intermixed_args()
    shared = [*options.overrides, *([f"train.steps={options.steps}"] if options.steps else [])]

    def measure(name: str) -> tuple[str, dict]:
        run = options.out / name.replace(" ", "-")
        if not (run / "evaluation.json").exists():
            ernie5("train", options.config, *shared, *VARIANTS[name], f"train.run_dir={run}")
            ernie5("evaluate", str(run))
        return name, json.loads((run / "evaluation.json").read_text(encoding="utf-8"))

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(measure, VARIANTS))
    text = table(rows)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def ernie5(*arguments: str) -> None:
    """Run a verb of the command line with one thread; raises SystemExit with its exit code where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ernie5", *arguments], check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)


def table(rows: list[tuple[str, dict]]) -> str:
    """One row per variant: validation losses in nats per target, then the figures of COLUMNS."""
    modalities = list(rows[0][1]["losses"])
    lines = ["| variant | " + " | ".join([f"{m} loss" for m in modalities] + list(COLUMNS.values())) + " |"]
    lines.append("| --- |" + " ---: |" * (len(modalities) + len(COLUMNS)))
    for name, evaluation in rows:
        losses = {modality: f"{loss:.4f}" for modality, loss in evaluation["losses"].items()}
        figures = {key: f"{figure['value']:.3f}" for key, figure in evaluation["figures"].items()}
        cells = [losses.get(m, "-") for m in modalities] + [figures.get(key, "-") for key in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
