"""Race a whole training step (forward, backward, AdamW) against transformers' models, and say where its time goes.

  python tools/bench_step/main.py [S M X] [--rounds 3] [--threads 2] [--layers N] [--out FOLDER]
  python tools/bench_step/main.py --quick       a minute: one small shape, one round

First the gate: with the weights of Ernie4_5_MoeForCausalLM our loss and gradients are its own. Then our step in bf16
runs in turn with every other contestant, one at a time (memory); ratios are medians over rounds. FOLDER gets
bench_step.json and bench_step.png. Malloc keeps freed memory for all contestants alike. Ours clips gradients and keeps
fp32 masters; peers do neither, their parameters being of the dtype named.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench_peers"))

from arguments import at_least, folder, num_threads
from gate import gate_step
from machine import Machine, measure_machine
from measure import HEADER, Timing, race
from ours import build_step
from parts import by_part
from peers import FAMILIES, IMPLEMENTATIONS, build_peer_step, possible
from picture import draw
from results import ShapeResult
from shapes import ROW_TOKENS, SHAPES, VOCABULARY, Shape

from ernie5_kernels.native.memory import keep_freed_memory

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
QUICK = Shape("quick", 64, 1, 8, 2, 32, 2, 1, ROW_TOKENS)


def contestants(
    shape: Shape, *, kinds: tuple[str, ...], precisions: tuple[str, ...], ids: torch.Tensor
) -> dict[str, Callable[[], Callable]]:
    """Name -> builder of everyone beside our bf16 step."""
    found: dict[str, Callable] = {}
    if "fp32" in precisions:
        found["ours float32"] = lambda: build_step(shape, precision="fp32", ids=ids)
    for family in FAMILIES:
        for dtype in (DTYPES[precision] for precision in precisions):
            for kind in (k for k in kinds if possible(shape, implementation=k, dtype=dtype)):
                found[f"{family} {kind} {str(dtype).removeprefix('torch.')}"] = (
                    lambda family=family, kind=kind, dtype=dtype: build_peer_step(
                        family, shape=shape, implementation=kind, dtype=dtype, ids=ids
                    )
                )
    return found


def run_shape(
    shape: Shape, *, rounds: int, kinds: tuple[str, ...], precisions: tuple[str, ...], machine: Machine
) -> ShapeResult:
    """Gate, race, take apart."""
    difference = gate_step(shape)
    ids = torch.randint(0, VOCABULARY, (shape.tokens // ROW_TOKENS, ROW_TOKENS))
    ours = build_step(shape, precision="bf16", ids=ids)
    ours()
    first = race({"ours bfloat16": ours}, flops=shape.step_flops, rounds=rounds)[0]
    print(f"\nstep {shape}\n{HEADER}\n{first.row(ours=first)}", flush=True)
    pairs: list[tuple[Timing, Timing]] = []
    for name, build in contestants(shape, kinds=kinds, precisions=precisions, ids=ids).items():
        own, other = race({"ours bfloat16": ours, name: build()}, flops=shape.step_flops, rounds=rounds)
        pairs.append((own, other))
        print(other.row(ours=own), flush=True)
        gc.collect()
    started = time.process_time()
    ours()
    parts = by_part(ours, whole=time.process_time() - started)
    result = ShapeResult.build(shape, machine=machine, gate=difference, ours=first, pairs=pairs, parts=parts)
    print(result.summary(), flush=True)
    return result


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="S, M, X; all three by default")
    parser.add_argument("--rounds", type=at_least(1), help="each after one that is not counted; 3 by default")
    parser.add_argument("--threads", type=num_threads, default=2)
    parser.add_argument("--layers", type=at_least(1), default=0,
                        help="instead of the shape's, where memory or time is short")
    parser.add_argument("--kinds", nargs="+", default=("grouped_mm", "eager"), choices=IMPLEMENTATIONS)
    parser.add_argument("--precisions", nargs="+", default=("bf16", "fp32"), choices=DTYPES, help="of the others")
    parser.add_argument("--quick", action="store_true", help="a small shape of its own, one round by default")
    parser.add_argument("--out", type=folder, help="folder for bench_step.json and bench_step.png")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.shapes if name not in SHAPES]
    if unknown:
        parser.error(f"unknown shape {unknown[0]}; known: {', '.join(SHAPES)}")
    if arguments.quick and arguments.shapes:
        parser.error(f"--quick has a shape of its own. Leave out {' '.join(arguments.shapes)}, or --quick")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    shapes = [QUICK] if arguments.quick else [SHAPES[name] for name in arguments.shapes or SHAPES]
    if arguments.layers:
        shapes = [dataclasses.replace(shape, layers=arguments.layers) for shape in shapes]
    machine = measure_machine(size=512 if arguments.quick else 4096, rounds=5)
    print(machine)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    kinds, precisions = tuple(arguments.kinds), tuple(arguments.precisions)
    results = [run_shape(s, rounds=rounds, kinds=kinds, precisions=precisions, machine=machine) for s in shapes]
    if arguments.out:
        record = {
            "date": time.strftime("%Y-%m-%d %H:%M"), "torch": torch.__version__, "machine": dataclasses.asdict(machine),
            "shapes": [result.record() for result in results],
        }
        (arguments.out / "bench_step.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        draw(results, path=arguments.out / "bench_step.png")


if __name__ == "__main__":
    main()
