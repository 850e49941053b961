"""Rate of each CPU kernel beside plain PyTorch, of the expert layer beside a dense one, and with more experts.

  python tools/bench_kernels/main.py [kernels dense experts] [--shape S|M|X] [--tokens N] [--threads 1] [--out FOLDER]
  python tools/bench_kernels/main.py --quick     half a minute on small sizes

kernels: forward and backward of every kernel and of the same in plain PyTorch, in bf16 and fp32, after a gate of
equality; dense: the expert layer against a SwiGLU layer of the same FLOPs per token; experts: the layer from 16 to 512
experts at constant active parameters. Rates are per CPU second of all threads, medians over rounds, contestants in
turn. FOLDER gets bench_kernels.json and bench_kernels.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench_peers"))

from arguments import at_least, folder, num_threads
from cases import Case, build_cases
from machine import measure_machine
from measure import Timing, race
from ours import build_layer, layer_inputs
from picture import draw
from shapes import ROW_TOKENS, SHAPES, Shape

from ernie5.model.mlp import SwiGLU
from ernie5_kernels.native.memory import keep_freed_memory

TOLERANCES = {torch.bfloat16: 3e-2, torch.float32: 1e-4}  # of the largest value: bf16 keeps 8 bits; orders of sums
EXPERT_COUNTS = (16, 64, 128, 256, 512)
WARM_ROUNDS = 8  # of layers with many tokens: see measure.warm_up
QUICK = Shape("quick", 64, 1, 8, 2, 32, 2, 1, ROW_TOKENS)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line: CPU seconds of ours and of the other, their ratio (median over rounds), ours in GFLOP/s or GB/s."""

    group: str
    name: str
    seconds: float
    other_seconds: float
    ratio: float
    rate: float
    unit: str


def backward_of(function: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> Callable[[], list]:
    """Forward and backward under an upstream gradient of ones; returns output and gradients."""

    def run() -> list[torch.Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return run


def gate(case: Case, *, dtype: torch.dtype) -> None:
    """Outputs and gradients agree; raises SystemExit otherwise."""
    pairs = zip(*(backward_of(f, case.leaves)() for f in (case.ours, case.plain)), strict=True)
    worst = max(float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6)) for a, b in pairs)
    if not worst < TOLERANCES[dtype]:
        sys.exit(f"{case.name} in {dtype} differs from PyTorch by {worst:.1e} of the largest value: nothing is timed")


def row_of(timings: list[Timing], *, group: str, name: str, amount: float, unit: str) -> Row:
    """Ours first, the other second."""
    ours, other = timings
    ratios = sorted(b / a for a, b in zip(ours.cpu_seconds, other.cpu_seconds, strict=True))
    seconds, others = (sorted(t.cpu_seconds)[len(t.cpu_seconds) // 2] for t in timings)
    return Row(group, name, seconds, others, ratios[len(ratios) // 2], amount / seconds / 1e9, unit)


def race_kernels(shape: Shape, *, rounds: int) -> list[Row]:
    """Every kernel in both precisions."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for case in build_cases(shape, dtype=dtype):
            gate(case, dtype=dtype)
            runs = {"ours": backward_of(case.ours, case.leaves), "plain": backward_of(case.plain, case.leaves)}
            amount, unit = (case.flops, "GFLOP/s") if case.flops else (case.moved_bytes, "GB/s")
            group = f"{shape.name} {str(dtype).removeprefix('torch.')}, other: PyTorch"
            timings = race(runs, flops=0, rounds=rounds)
            rows.append(row_of(timings, group=group, name=case.name, amount=amount, unit=unit))
    return rows


def layer_run(shape: Shape) -> Callable[[], None]:
    """Forward and backward of our expert layer in bf16."""
    layer, inputs = build_layer(shape, dtype=torch.bfloat16), layer_inputs(shape)
    return _module_run(shape, layer=layer, call=lambda x: layer(x, inputs=inputs)[0])


def dense_run(shape: Shape) -> Callable[[], None]:
    """Forward and backward of a dense SwiGLU of the same FLOPs per token."""
    layer = SwiGLU(shape.width, hidden_width=shape.top_k * shape.expert_width).bfloat16()
    return _module_run(shape, layer=layer, call=layer)


def _module_run(
    shape: Shape, *, layer: torch.nn.Module, call: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], None]:
    x = torch.randn(shape.tokens // ROW_TOKENS, ROW_TOKENS, shape.width).bfloat16().requires_grad_()
    upstream = torch.randn(x.shape).bfloat16()

    def run() -> None:
        call(x).backward(upstream)
        layer.zero_grad(set_to_none=True)

    return run


def race_dense(shape: Shape, *, rounds: int) -> list[Row]:
    """The expert layer against the dense one: a ratio below 1 is what routing costs."""
    timings = race(
        {"ours": layer_run(shape), "dense": dense_run(shape)}, flops=0, rounds=rounds, warm_rounds=WARM_ROUNDS
    )
    name = f"expert layer, {shape.tokens} tokens"
    return [row_of(timings, group="other: dense FFN of the same FLOPs", name=name, amount=shape.layer_flops,
                   unit="GFLOP/s")]


def race_experts(shape: Shape, *, rounds: int, counts: tuple[int, ...]) -> list[Row]:
    """More experts against the fewest."""
    runs = {n: layer_run(dataclasses.replace(shape, experts=n)) for n in counts}
    rows = []
    for n in counts:
        timings = race(
            {"ours": runs[n], "fewest": runs[counts[0]]}, flops=0, rounds=rounds, warm_rounds=WARM_ROUNDS
        )
        flops = dataclasses.replace(shape, experts=n).layer_flops
        rows.append(row_of(timings, group=f"other: {counts[0]} experts, {shape.tokens} tokens", name=f"{n} experts",
                           amount=flops, unit="GFLOP/s"))
    return rows


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="kernels, dense, experts; all by default")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="S by default")
    parser.add_argument("--tokens", type=at_least(ROW_TOKENS, multiple=ROW_TOKENS), default=0,
                        help="instead of the shape's, in rows of 1,024")
    parser.add_argument("--rounds", type=at_least(1),
                        help="after one that is not counted, of layers up to eight; 3 by default")
    parser.add_argument("--threads", type=num_threads, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes of its own, one round by default")
    parser.add_argument("--out", type=folder, help="folder for bench_kernels.json and bench_kernels.png")
    arguments = parser.parse_args()
    chosen = arguments.what or ["kernels", "dense", "experts"]
    if set(chosen) - {"kernels", "dense", "experts"}:
        parser.error(f"cannot measure {', '.join(sorted(set(chosen) - {'kernels', 'dense', 'experts'}))}")
    if arguments.quick and arguments.shape:
        parser.error(f"--quick has a shape of its own. Leave out --shape {arguments.shape}, or --quick")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    shape = QUICK if arguments.quick else SHAPES[arguments.shape or "S"]
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    shape = dataclasses.replace(shape, tokens=arguments.tokens or shape.tokens)
    machine = measure_machine(size=512 if arguments.quick else 2048)
    print(machine, "\n| | kernel | CPU s | other's | other / ours | rate |\n|---|---|---|---|---|---|", flush=True)
    rows: list[Row] = []
    for name, run in (
        ("kernels", lambda: race_kernels(shape, rounds=rounds)), ("dense", lambda: race_dense(shape, rounds=rounds)),
        ("experts", lambda: race_experts(
            shape, rounds=rounds, counts=EXPERT_COUNTS[:2] if arguments.quick else EXPERT_COUNTS)),
    ):
        for row in run() if name in chosen else []:
            rows.append(row)
            print(f"| {row.group} | {row.name} | {row.seconds:.4f} | {row.other_seconds:.4f} | {row.ratio:.2f} | "
                  f"{row.rate:.0f} {row.unit} |", flush=True)
    if arguments.out:
        record = {
            "date": time.strftime("%Y-%m-%d %H:%M"), "torch": torch.__version__, "shape": dataclasses.asdict(shape),
            "machine": dataclasses.asdict(machine), "rows": [dataclasses.asdict(row) for row in rows],
        }
        (arguments.out / "bench_kernels.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        draw([(f"{row.name} ({row.group})", row.ratio) for row in rows], path=arguments.out / "bench_kernels.png")


if __name__ == "__main__":
    main()
