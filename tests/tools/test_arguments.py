"""Wrong arguments of the measuring tools end in one line and 2 before anything is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("transformers", "triton"):
    pytest.importorskip(needed)

DEBUG = "configs/pretrain/debug.yaml"
WRONG = (
    ("bench_step/main", ("--quick", "--out", "{file}"), "--out: cannot write to the folder"),
    ("bench_step/main", ("--quick", "--out", ""), "--out: it is empty; name a folder"),
    ("bench_step/main", ("S", "--quick"), "--quick has a shape of its own. Leave out S, or --quick"),
    ("bench_kernels/main", ("--quick", "--shape", "M"), "--quick has a shape of its own. Leave out --shape M, or"),
    ("bench_kernels/main", ("--quick", "--threads", "0"), "--threads: it is 0 and must be at least 1"),
    ("bench_kernels/main", ("--quick", "--threads", "100000"), "it is 100000 and must be at least 1 and at most"),
    ("bench_peers/main", ("layer", "S", "--tokens", "100"), "--tokens: it is 100 and must be a multiple of 1024"),
    ("bench_peers/main", ("layer", "S", "--layers", "2"), "`layer` races one layer. Leave out --layers 2, or race"),
    ("bench_peers/main", ("step", "S", "--packages", "deepspeed"), "--packages have a layer, no step"),
    ("bench_peers/main", ("layer", "S", "--out", "{folder}"), "is a folder, and a file is written"),
    ("bench_gpu/main", ("--budget", "nan", "--out", "{folder}"), "--budget must be positive seconds"),
    ("aot_report/main", ("--op", "nothing", "--out", "{folder}/report"), "--op: invalid choice"),
    ("aot_report/main", ("--quick", "--op", "adamw", "--out", "{folder}/report"), "no kernel is left to compile"),
    ("layout_memory/main", ("--ranks", "2"), "unrecognized arguments: --ranks 2"),
    ("layout_memory/part", (DEBUG, "--rank", "1"), "--rank 1: dp1 cp1 tp1 pp1 | edp1 ep1 etp1 has the ranks 0 to 0"),
    ("layout_memory/part", (DEBUG, "parallel.tq=2"), "ConfigError: parallel.tq: unknown key"),
    ("checkpoint_memory/main", ("--layout", "ep"), "--layout: 'ep' is no axis=number; axes are dp, cp, tp, ep, etp"),
    ("checkpoint_memory/main", ("--layout", "ep=3"), "LayoutError: ParallelConfig.ep = 3: does not divide"),
    ("activation_memory", ("64", "nativ"), "kernels: invalid choice: 'nativ'"),
    ("convert_memory/main", ("--steps", "own-hub"), "own-hub goes on from own, which must stand before it"),
    ("chaos/main", ("--kills", "0", "--out", "{folder}"), "--kills: it is 0 and must be at least 1"),
)


@pytest.mark.parametrize(("tool", "given", "said"), WRONG)
def test_wrong_arguments_end_in_one_line(
    tool: str, given: tuple[str, ...], said: str, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    given = tuple(text.format(file=tmp_path / "file", folder=tmp_path) for text in given)
    done = subprocess.run(
        [sys.executable, f"tools/{tool}.py", *given], cwd=repository, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_interpreted_kernels_are_not_reported_as_compiled(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/aot_report/main.py", "--quick", "--out", str(tmp_path / "report")], cwd=repository,
        capture_output=True, text=True, timeout=120, env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 2 and "TRITON_INTERPRET is set" in done.stderr.splitlines()[-1]
