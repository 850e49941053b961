"""The matrix rate is measured, kept in the run directory, and is what mfu refers to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ernie5.observe import throughput
from ernie5.observe.throughput import MatrixRate, matrix_rate, step_speed


def test_mfu_is_useful_flops_over_the_measured_rate_of_all_devices() -> None:
    rate = MatrixRate(1e12, 1024, "float32", "cpu", 1)
    speed = step_speed(1000, seconds=2.0, flops_per_token=1e9, rate=rate, devices=2)
    assert (speed.tokens_per_second, speed.step_seconds) == (500.0, 2.0)
    assert speed.mfu == 500.0 * 1e9 / 2e12


def test_the_measured_rate_is_written_to_the_run_directory(tmp_path: Path) -> None:
    rate = matrix_rate(tmp_path / "run", device=torch.device("cpu"), dtype=torch.float32)
    assert 1e8 < rate.flops_per_second < 1e14  # between a toaster and a rack
    kept = json.loads((tmp_path / "run" / "matrix_rate.json").read_text(encoding="utf-8"))
    assert kept["flops_per_second"] == rate.flops_per_second and kept["dtype"] == "float32"


def test_bf16_is_timed_as_fp32_where_the_processor_does_not_multiply_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's bf16 product on a CPU with AVX2 alone has 1/60 of the rate of its fp32: mfu was 32 against it."""
    monkeypatch.setattr(throughput, "multiplies_bf16", lambda device: False)
    rate = matrix_rate(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert rate.dtype == "float32"


def test_ranks_whose_figures_nobody_reads_write_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share the run directory, and in containers of several hosts their process ids too."""
    monkeypatch.chdir(tmp_path)
    assert matrix_rate(None, device=torch.device("cpu"), dtype=torch.float32, peak_tflops=2.0).flops_per_second == 2e12
    assert not list(tmp_path.iterdir())


def test_a_given_peak_replaces_measuring(tmp_path: Path) -> None:
    rate = matrix_rate(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16, peak_tflops=2.0)
    assert (rate.flops_per_second, rate.side) == (2e12, 0)
