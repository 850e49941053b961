"""Runs the Triton kernels' checks: here under Triton's interpreter, on a GPU as they are.

A process of its own, because Triton decides while it is imported whether its functions are interpreted.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_checks(repository: Path, *, interpreted: bool) -> None:
    """Run tests/kernels/triton/check_*.py and fail with their output where one fails.

    On a GPU some 250 kernels are compiled, one second or more each: by several processes where pytest-xdist is there.
    """
    spread = () if interpreted or importlib.util.find_spec("xdist") is None else ("-n", "8")
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-c", "tests/pytest.ini", "--rootdir=.",
            "-o", "python_files=check_*.py", *spread, "tests/kernels/triton",
        ],
        cwd=repository, capture_output=True, text=True, timeout=550,
        env={**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]


def test_every_triton_kernel_matches_its_reference_in_the_interpreter(repository: Path) -> None:
    run_checks(repository, interpreted=True)


@pytest.mark.gpu
def test_every_triton_kernel_matches_its_reference_on_the_gpu(repository: Path) -> None:
    run_checks(repository, interpreted=False)
