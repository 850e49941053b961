"""What the machine gives, measured in the same run as what is compared with it."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time

import torch

COPIED_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Machine:
    """Median rates of a square product (FLOP/s) and of a copy (bytes read plus written per second), per wall second and
    per CPU second of all threads; load: the one-minute load average before."""

    processor: str
    threads: int
    load: float
    product_size: int
    bf16_wall: float
    bf16_cpu: float
    fp32_wall: float
    fp32_cpu: float
    bandwidth_wall: float
    bandwidth_cpu: float


def measure_machine(*, size: int, rounds: int = 5) -> Machine:
    """Products of size^3 and copies of 256 MiB, the first round of each not counted."""
    load = os.getloadavg()[0]
    rates: list[float] = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        rates += _rates(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), amount=2.0 * size**3, rounds=rounds)
    source, target = torch.zeros(COPIED_BYTES // 4), torch.zeros(COPIED_BYTES // 4)
    rates += _rates(lambda: target.copy_(source), amount=2.0 * COPIED_BYTES, rounds=rounds)
    return Machine(_processor(), torch.get_num_threads(), load, size, *rates)


def _rates(run: object, *, amount: float, rounds: int) -> list[float]:
    wall, cpu = [], []
    for index in range(rounds + 1):
        started, used = time.perf_counter(), time.process_time()
        run()
        if index:
            wall.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
    return [amount / statistics.median(wall), amount / statistics.median(cpu)]


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        found = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    features = [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]
    return f"{len(found)} x {found[0]} ({', '.join(features) or 'no bf16 products'})"
