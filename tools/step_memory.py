"""Peak memory of a training step at a shape of bench_step, beside what must be there: states, gradients, activations.

    OMP_NUM_THREADS=1 .venv/bin/python tools/step_memory.py S|M|X [--steps N]

One process, bf16 with fp32 masters, no recompute. Two readings: the tensors that live at once, and what the process
grew by since its libraries were loaded and a tiny model had taken a step (the system's high-water mark, with whatever
malloc keeps of freed memory).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).with_name("bench_peers")))

from arguments import at_least
from live_bytes import LiveBytes
from ours import build_step
from shapes import HEAD_WIDTH, ROW_TOKENS, SHAPES, VOCABULARY, Shape

from ernie5_kernels.native.memory import keep_freed_memory

TINY = Shape("tiny", 64, 1, 8, 2, 32, 2, 1, ROW_TOKENS)
STATE_BYTES = 2 + 4 + 8  # a parameter's bf16 weight, fp32 master, two moments
GRADIENT_BYTES = 2
MIB = 2**20


def high_water() -> int:
    """Bytes of this process's memory at its highest."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[1])


def activation_bytes(shape: Shape) -> int:
    """What backward needs of forward: per layer two residuals, both norms' outputs, queries, keys and values as
    attention reads them, its output, and both halves of each chosen expert's first product; the last hidden states and
    their gradient, which the fused loss makes on the way. All bf16, plus one fp32 number per choice."""
    heads, keys = shape.query_heads * HEAD_WIDTH, shape.kv_heads * HEAD_WIDTH
    per_token = 4 * shape.width + 2 * heads + 2 * keys + shape.top_k * 2 * shape.expert_width
    return shape.tokens * (shape.layers * (2 * per_token + 4 * shape.top_k) + 2 * 2 * shape.width)


def stepper(shape: Shape) -> Callable[[], float]:
    ids = torch.randint(0, VOCABULARY, (shape.tokens // ROW_TOKENS, ROW_TOKENS))
    return build_step(shape, precision="bf16", ids=ids)


def main(shape: Shape, steps: int) -> None:
    keep_freed_memory()
    stepper(TINY)()
    before = high_water()
    step = stepper(shape)
    for _ in range(steps):
        step()
    grown = high_water() - before
    with LiveBytes() as counter:
        step()
    states = STATE_BYTES * shape.parameters
    least = states + GRADIENT_BYTES * shape.parameters + activation_bytes(shape)
    live = states + counter.peak
    print(f"{shape.name}: states {states / MIB:.0f} MiB, gradients {GRADIENT_BYTES * shape.parameters / MIB:.0f}, "
          f"activations {activation_bytes(shape) / MIB:.0f}: {least / MIB:.0f}\n"
          f"live tensors at most {live / MIB:.0f} MiB, {live / least:.2f} of it; "
          f"the process grew by {grown / MIB:.0f}, {grown / least:.2f} of it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--steps", type=at_least(1), default=8, help="before the reading; malloc settles in a few")
    arguments = parser.parse_args()
    main(SHAPES[arguments.shape], arguments.steps)
