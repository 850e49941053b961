"""Ranks that would resume from different checkpoints train no model: they say so instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest


def load_file(name: str, path: Path) -> object:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JOB = load_file("source_job", Path(__file__).with_name("source_job.py"))
run_ranks = load_file("ranks", Path(__file__).parents[1] / "parallel" / "conftest.py").run_ranks


@pytest.mark.parametrize("seen,names", [
    ([2, 1], ("rank 0: step-00000002", "rank 1: step-00000001")), ([0, 2], ("rank 0: none", "rank 1: step-00000002")),
])
def test_other_checkpoints_on_other_ranks_end_the_start(
    seen: list[int], names: tuple[str, str], run_ranks: Callable, tmp_path: Path
) -> None:
    for error, message in run_ranks(JOB.resume, 2, str(tmp_path), seen):
        assert error == "EnvironmentFault" and "shared storage" in message
        assert all(name in message for name in names), message


def test_ranks_that_see_the_same_go_on_from_it(run_ranks: Callable, tmp_path: Path) -> None:
    assert run_ranks(JOB.resume, 2, str(tmp_path), [2, 2]) == [("", "2"), ("", "2")]


def test_other_checkpoints_to_go_back_to_end_the_run(run_ranks: Callable, tmp_path: Path) -> None:
    for error, message in run_ranks(JOB.go_back, 2, str(tmp_path)):
        assert error == "EnvironmentFault" and "rank 0: step-00000002, rank 1: step-00000001" in message
