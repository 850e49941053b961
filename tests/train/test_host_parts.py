"""The replica on several hosts: parts that each host can be read back from alone, and when they are of no use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.checkpoint.load import load_run
from ernie5.errors import CheckpointError



def load_file(name: str, path: Path) -> object:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JOB = load_file("host_parts_job", Path(__file__).with_name("host_parts_job.py"))
run_ranks_once = load_file("ranks", Path(__file__).parents[1] / "parallel" / "conftest.py").run_ranks_once
# stages on two hosts; cuts within a host and copies across; each is the wrong layout of the other
LAYOUTS = [{"pp": 2}, {"tp": 2, "ep": 2}]


def test_each_host_reads_its_part_back_and_all_agree_when_not_to(run_ranks_once: Callable, tmp_path: Path) -> None:
    everyone = run_ranks_once(JOB.through_memory, 4, str(tmp_path), LAYOUTS)
    assert all(isinstance(one, list) for one in everyone), everyone
    for results in everyone:
        for result in results:
            assert result == {
                "done": [True, True], "same": True, "step": 2, "disk": True, "elsewhere": True, "layout": True,
                "history": 1, "damaged": True, "steps": ["step-00000001", "step-00000002"],
            }
    with pytest.raises(CheckpointError, match="the part of a run's state that one of its hosts keeps"):
        load_run(tmp_path / "layout-1" / "host-1" / "step-00000002")
