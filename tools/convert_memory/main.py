"""Peak memory of `ernie5 convert` on a model in the shape of ERNIE 4.5 21B-A3B with random bf16 weights.

    python tools/convert_memory/main.py --layers 28            # all of it: 44 GB, and as much for each conversion
    python tools/convert_memory/main.py --layers 28 --holes    # of zeros, which are dug out of the files as they grow

Prints the resident peak of hub -> ernie5 -> hub and hub -> Paddle (transposed) -> hub, each in its own process, beside
that of importing the same code. Exit code 1 where a peak exceeds the limit.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_peers"))

from arguments import at_least, ended_in_words

from ernie5.checkpoint.convert.copying import plan_files
from ernie5.checkpoint.convert.ernie45_config import SpecialIds, config_values
from ernie5.checkpoint.convert.layouts import hub_layout
from ernie5.checkpoint.tensor_slices import DTYPES, create_file, write_span
from ernie5.config.load import load_config
from ernie5.config.registry import resolve
from ernie5.model.config import ModelConfig

CONFIG = Path(__file__).resolve().parents[2] / "configs/pretrain/ernie45_21b.yaml"
STEPS = {"own": ("hub", "ernie5"), "own-hub": ("own", "ernie45-hf"),
         "paddle": ("hub", "ernie45-paddle"), "paddle-hub": ("paddle", "ernie45-hf")}
DIG = ("-name", "*.safetensors", "-exec", "fallocate", "--dig-holes", "{}", ";")


def main() -> int:
    """Run the measurement; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("layers", 4), ("experts", 64), ("vocab", 103424), ("limit-mib", 4096)):
        parser.add_argument(f"--{option}", type=at_least(1), default=default)
    parser.add_argument("--holes", action="store_true", help="models of zeros that fill no disk (Linux)")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=[*STEPS])
    options = parser.parse_args()
    for step in options.steps:
        if STEPS[step][0] not in ("hub", *options.steps[: options.steps.index(step)]):
            parser.error(f"--steps: {step} goes on from {STEPS[step][0]}, which must stand before it")
    with tempfile.TemporaryDirectory(prefix="convert-memory-") as work:  # in $TMPDIR
        return measure(options, work=Path(work))


def measure(options: argparse.Namespace, *, work: Path) -> int:
    """Write the source, convert, print; 1 where a peak exceeds the limit."""
    model = load_config(CONFIG, schema=resolve("root", name="train")).model
    moe = dataclasses.replace(model.moe, num_experts=options.experts, top_k=min(6, options.experts))
    model = dataclasses.replace(model, moe=moe, layers=options.layers, vocab_size=options.vocab)
    total = write_source(work / "hub", model=model, has_holes=options.holes)
    idle = run_convert("--help")[0]
    print(f"{options.layers} layers of {options.experts} experts: {total / 2**20:,.0f} MiB; import {idle:,.0f} MiB")
    peaks = []
    for target, (source, name) in ((target, STEPS[target]) for target in options.steps):
        peak, seconds = run_convert(work / source, work / target, "--to", name, zeros_in=work if options.holes else "")
        print(f"{source} -> {name}: peak {peak:,.0f} MiB, {peak - idle:,.0f} above import, {seconds:.0f} s", flush=True)
        peaks.append(peak)
        for done in (target, source) if "-" in target else ():
            shutil.rmtree(work / done)
    return int(max(peaks) > options.limit_mib)


def write_source(folder: Path, *, model: ModelConfig, has_holes: bool) -> int:
    """Random weights, or zeros that no disk holds, shard by shard in the hub's layout; returns their bytes."""
    folder.mkdir()
    layout = hub_layout(model)
    noise = (torch.randn(1 << 23) * 0.02).bfloat16()
    weight_map, total, pieces = {}, 0, {p.name: noise for s in layout for p in s.pieces}
    for planned in plan_files(layout, pieces=pieces, dtype=None, keep_fp32=True, shard_bytes=5 * 10**9):
        for name, place in create_file(folder / planned.name, tensors=planned.headers()).items():
            with place.path.open("r+b", buffering=0) as file:
                for first in range(0, 0 if has_holes else math.prod(place.shape), len(noise)):
                    values = noise[: math.prod(place.shape) - first].to(DTYPES[place.dtype])
                    write_span(file.fileno(), place=place, first=first, values=values)
            weight_map[name], total = planned.name, total + place.num_bytes
    config = config_values(model, base={}, ids=SpecialIds(0, 1, 2), dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def run_convert(*arguments: object, zeros_in: Path | str = "") -> tuple[float, float]:
    """Peak MiB and seconds of one `ernie5 convert`; raises SystemExit where it fails. zeros_in: what to dig out."""
    start, command = time.monotonic(), [sys.executable, "-m", "ernie5", "convert", *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (ended := os.wait4(child.pid, os.WNOHANG if zeros_in else 0))[0]:
        time.sleep(4)
        subprocess.run(["find", zeros_in, *DIG], stderr=subprocess.DEVNULL, check=False)  # some have moved meanwhile
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with exit code {child.returncode}")
    return ended[2].ru_maxrss / 1024, time.monotonic() - start


if __name__ == "__main__":
    sys.exit(ended_in_words(main))
