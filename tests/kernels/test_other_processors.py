"""The C++ kernels as compiled for processors with narrower registers than this one may have: AVX2, SSE."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ernie5_kernels.native.library import FLAGS, native_library, pointer, sizes

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "native"
COMPILER = os.environ.get("CXX", "g++")
CPU_FLAGS = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
TARGETS = {"haswell": "avx2", "x86-64-v2": "sse4_2"}  # 8 lanes and 4, with and without fused sums
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")


def _require(target: str) -> None:
    if native_library() is None or TARGETS[target] not in CPU_FLAGS:
        pytest.skip(f"needs a C++ compiler and a processor with {TARGETS[target]}")


@pytest.mark.parametrize("target", TARGETS)
def test_products_are_right_in_narrower_registers(target: str, tmp_path: Path) -> None:
    _require(target)
    made = tmp_path / "products.so"
    sources = [str(SOURCES / name) for name in ("gemm.cpp", "tiles.cpp", "linear.cpp")]
    subprocess.run([COMPILER, *FLAGS, f"-march={target}", *sources, "-o", str(made)], check=True, timeout=600)
    library = ctypes.CDLL(str(made))
    for dtype in (torch.float32, torch.bfloat16):
        for rows, summed, columns in ((1, 2, 1), (13, 33, 65), (31, 64, 40), (200, 7, 100)):
            x, weight, upstream = (torch.randn(shape).to(dtype) for shape in (
                (rows, summed), (columns, summed), (rows, columns)))
            y, grad = torch.full_like(upstream, torch.nan), torch.full_like(weight, torch.nan)
            narrow = ctypes.c_int(dtype == torch.bfloat16)
            library.ernie5_product(narrow, *map(pointer, (x, weight, y)), *sizes(rows, summed, columns), 1, 1)
            library.ernie5_outer(narrow, *map(pointer, (upstream, x, grad)), *sizes(columns, summed, rows), 1)
            # a rounding of the result where it is bf16, of the sums else
            allowed = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(y.double(), x.double() @ weight.double().T, **allowed)
            torch.testing.assert_close(grad.double(), upstream.double().T @ x.double(), **allowed)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_operator_passes_in_narrower_registers(target: str, tmp_path: Path) -> None:
    """test_native.py as a whole, its library compiled for another processor."""
    _require(target)
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -march={target}\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "tests/pytest.ini", "--rootdir=.", "tests/kernels/test_native.py"],
        cwd=HERE.parents[1], capture_output=True, text=True, timeout=1800,
        env={**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout
