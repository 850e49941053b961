"""Wrong arguments of the measuring tools end in one line and 2 before anything is measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("transformers", "triton"):
    pytest.importorskip(needed)

WRONG = (
    ("bench_step", ("--quick", "--out", "{file}"), "--out: cannot write to the folder"),
    ("bench_kernels", ("--quick", "--threads", "0"), "--threads: it is 0 and must be at least 1"),
    ("bench_peers", ("layer", "S", "--tokens", "100"), "--tokens: it is 100 and must be a multiple of 1024"),
    ("bench_peers", ("layer", "S", "--out", "{folder}"), "is a folder, and a file is written"),
    ("aot_report", ("--op", "nothing", "--out", "{folder}/report"), "--op: invalid choice"),
)


@pytest.mark.parametrize(("tool", "given", "said"), WRONG)
def test_wrong_arguments_end_in_one_line(
    tool: str, given: tuple[str, ...], said: str, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    given = tuple(text.format(file=tmp_path / "file", folder=tmp_path) for text in given)
    done = subprocess.run(
        [sys.executable, f"tools/{tool}/main.py", *given], cwd=repository, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
