"""The benchmark tools in their quick mode: the gate passes, figures and picture are written, bad input is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=repository, capture_output=True, text=True, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.mark.slow
def test_a_quick_race_of_the_step_writes_ratios_parts_and_a_picture(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "tools/bench_step/main.py", "--quick", "--threads", "1", "--kinds", "grouped_mm",
               "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (shape,) = json.loads((tmp_path / "bench_step.json").read_text())["shapes"]
    assert shape["gate"] < 5e-5
    names = [contestant["name"] for contestant in shape["contestants"]]
    assert names[:2] == ["ours bfloat16", "ours float32"] and len(names) == 8
    assert all(c["cpu_ratio"] > 0 and math.isfinite(c["wall_ratio"]) for c in shape["contestants"])
    assert shape["parts"]["experts"] > 0 and shape["parts"]["optimizer"] > 0
    assert "next bottleneck" in done.stdout
    assert (tmp_path / "bench_step.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_quick_race_of_the_kernels_writes_a_row_for_each(repository: Path, tmp_path: Path) -> None:
    done = run(repository, "tools/bench_kernels/main.py", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "bench_kernels.json").read_text())["rows"]
    assert len(rows) == 2 * 6 + 1 + 2
    assert all(row["seconds"] > 0 and row["rate"] > 0 for row in rows)
    assert (tmp_path / "bench_kernels.png").stat().st_size > 1000


def test_the_gate_of_layers_is_not_closed_by_two_experts_that_tie(repository: Path) -> None:
    """In this drawing two logits lie 4e-7 apart, and one order of the sum chooses otherwise than the other."""
    done = run(
        repository, "-c", "import sys; sys.path.insert(0, 'tools/bench_peers'); import torch; torch.manual_seed(472);"
        "from gate import gate_layer; from shapes import SHAPES; gate_layer(SHAPES['S'])",
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_layers_of_other_packages_run_beside_ours(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "layer.json"
    done = run(repository, "tools/bench_peers/main.py", "layer", "S", "--tokens", "1024", "--rounds", "1", "--threads",
               "1", "--kinds", "grouped_mm", "--family", "Mixtral", "--packages", "deepspeed", "autoep",
               "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    names = [timing["name"] for timing in json.loads(out.read_text())]
    beside = ("ours", "Mixtral grouped_mm", "deepspeed", "autoep")
    assert names == [f"{name} {dtype}" for dtype in ("bfloat16", "float32") for name in beside]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tools/bench_step/main.py", "Q"), "unknown shape Q; known: S, M, X"),
     (("tools/bench_kernels/main.py", "--tokens", "100"), "multiple of 1024"),
     (("tools/bench_gpu/main.py", "--out", "OUT", "--budget", "0"), "--budget must be positive"),
     (("tools/bench_gpu/main.py", "--out", "OUT", "--tune"), "no CUDA device here")],
)
def test_what_is_not_known_is_refused(
    repository: Path, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run(repository, *(str(tmp_path) if word == "OUT" else word for word in arguments))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
