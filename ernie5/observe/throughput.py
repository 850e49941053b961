"""Tokens per second, and model FLOP utilisation against a matrix rate that is measured at start."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch
from ernie5_kernels.processor import multiplies_bf16

from ernie5.observe.files import replace_file

CPU_SIDE, GPU_SIDE = 1024, 8192
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class MatrixRate:
    """The best rate of a square matrix product: what mfu = 1 would mean on this machine."""

    flops_per_second: float
    side: int
    dtype: str
    device: str
    threads: int

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        replace_file(path, content=(json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode("utf-8"))


@dataclasses.dataclass(frozen=True)
class Speed:
    """Figures of one step."""

    tokens_per_second: float
    mfu: float
    step_seconds: float


def measure_matrix_rate(device: torch.device, *, dtype: torch.dtype) -> MatrixRate:
    """Time a product of two square matrices (2 n^3 FLOPs); the best of five counts, after one to warm up.

    CPU: n = 1024, 0.1 s on one core; GPU: n = 8192. fp32 on the GPU follows torch's TF32 setting, as training does.
    bf16 is timed as fp32, and recorded so, where the processor does not multiply it itself.
    """
    dtype = dtype if multiplies_bf16(device) else torch.promote_types(dtype, torch.float32)
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(REPEATS + 1):
        _synchronise(device)
        start = time.perf_counter()
        left @ right
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return MatrixRate(2.0 * side**3 / best, side, str(dtype).removeprefix("torch."), name, torch.get_num_threads())


def matrix_rate(
    run_dir: Path | None, *, device: torch.device, dtype: torch.dtype, peak_tflops: float | None = None
) -> MatrixRate:
    """The rate that mfu refers to, written to RUN_DIR/matrix_rate.json; `peak_tflops` replaces measuring.

    run_dir: None on ranks whose figures nobody reads; they may have the same process id on other hosts.
    """
    if peak_tflops is not None:
        rate = MatrixRate(peak_tflops * 1e12, 0, str(dtype).removeprefix("torch."), device.type, 0)
    else:
        rate = measure_matrix_rate(device, dtype=dtype)
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        rate.save(run_dir / "matrix_rate.json")
    return rate


def step_speed(tokens: int, *, seconds: float, flops_per_token: float, rate: MatrixRate, devices: int = 1) -> Speed:
    """Speed of a step of `tokens` (padding not counted) over all `devices`, each of the measured rate."""
    per_second = tokens / seconds
    return Speed(per_second, per_second * flops_per_token / (rate.flops_per_second * devices), seconds)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
