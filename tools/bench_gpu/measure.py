"""Time on a GPU: CUDA events around a replayed graph, the L2 cache flushed before each, so that no host is measured."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

FLUSHED_BYTES = 256 << 20  # five times the L2 of an H100
SECONDS, FEWEST, MOST = 0.05, 5, 40
KEPT_BYTES = 24 << 30
HEAD_START = 20_000_000  # cycles, some 10 ms


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median milliseconds on the device; microseconds that the host takes to launch it; whether a graph was replayed
    (else the device waits before the first event, so that the host is ahead)."""

    ms: float
    host_us: float
    graphed: bool


@dataclasses.dataclass(frozen=True)
class Device:
    """The machine and what it reaches in this run: TFLOP/s of an 8192^3 bf16 product, GB/s of a copy of 1 GiB, and the
    milliseconds that a graph of one tiny kernel takes, below which no time here can fall."""

    name: str
    memory_gib: float
    driver: str
    cuda: str
    torch: str
    triton: str
    bf16_tflops: float
    copy_gbs: float
    floor_ms: float


class Stopwatch:
    """Times functions without arguments on the current device."""

    def __init__(self, *, rounds: int = MOST) -> None:
        self.flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
        self.rounds = rounds

    def time(self, function: Callable[[], object], *, graph: bool = True) -> Timing:
        """Run `function` twice, then measure. graph: try to capture it; without success it is called instead."""
        if torch.cuda.memory_reserved() > KEPT_BYTES:  # graphs that are gone still hold theirs
            torch.cuda.empty_cache()
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        host_us = self._host_us(function)
        replay = _captured(function) if graph else None
        call, cycles = replay or function, 0 if replay else HEAD_START
        rounds = max(FEWEST, min(self.rounds, int(SECONDS * 1e3 / max(1e-3, self._once(call, cycles=cycles)))))
        found = statistics.median(self._once(call, cycles=cycles) for _ in range(rounds))
        return Timing(found, host_us, replay is not None)

    def _once(self, function: Callable[[], object], *, cycles: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        if cycles:
            torch.cuda._sleep(cycles)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _host_us(self, function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        spent = time.perf_counter() - begin
        torch.cuda.synchronize()
        return spent * 1e6


def _captured(function: Callable[[], object]) -> Callable[[], None] | None:
    """The function as a graph, or None where it cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def difference(found: object, *, expected: object) -> float:
    """Largest |found - expected| over the largest |expected|, of the worst of one or several tensors; NaN is inf."""
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
    worst = 0.0
    for one, other in pairs:
        if one.shape != other.shape:
            raise ValueError(f"shapes differ: {tuple(one.shape)} and {tuple(other.shape)}")
        apart, largest = 0.0, 1e-20
        for a, b in zip(one.reshape(-1).split(1 << 26), other.reshape(-1).split(1 << 26), strict=True):
            ratio = (a.float() - b.float()).abs().max().item()
            apart = max(apart, ratio if ratio == ratio else float("inf"))
            largest = max(largest, b.float().abs().max().item())
        worst = max(worst, apart / largest)
    return worst


def describe(watch: Stopwatch) -> Device:
    """Measure the rates that shares are taken of."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = watch.time(lambda: torch.mm(a, b)).ms
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").zero_()
    target = torch.empty_like(source)
    copied = watch.time(lambda: target.copy_(source)).ms
    found = torch.cuda.get_device_properties(0)
    return Device(
        found.name, round(found.total_memory / 2**30, 1), _driver(), torch.version.cuda, torch.__version__,
        importlib.metadata.version("triton"), 2 * 8192**3 / product / 1e9, 2 * source.nbytes / copied / 1e6,
        watch.time(lambda: a[0, :1].zero_()).ms,
    )


def _driver() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True,
            timeout=20, check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked.stdout.split("\n")[0]
