"""`ernie5 inspect` shows tensors as a tree whose branches add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.checkpoint.manifest import TensorEntry
from ernie5.checkpoint.tree import grow_tree, tree_lines


def entry(*shape: int, num_bytes: int) -> TensorEntry:
    return TensorEntry(shape=shape, dtype="F32", num_bytes=num_bytes, slices=())


@pytest.fixture
def tensors() -> dict[str, TensorEntry]:
    return {
        "layers.0.norm.weight": entry(4, num_bytes=16),
        "layers.0.router.bias": entry(3, num_bytes=12),
        "layers.1.norm.weight": entry(4, num_bytes=16),
        "scale": entry(num_bytes=4),
        "exp_avg/layers.0.norm.weight": entry(4, num_bytes=16),
    }


def test_branches_hold_the_sum_of_their_parts_and_single_parts_share_a_line(tensors: dict[str, TensorEntry]) -> None:
    root = grow_tree(tensors)
    assert (root.tensors, root.values, root.num_bytes) == (5, 16, 64)
    lines = [" ".join(line.split()) for line in tree_lines(root)]
    assert lines == [
        "layers 11 values 44 B 3 tensors",
        "0 7 values 28 B 2 tensors",
        "norm.weight 4 values 16 B F32 4",
        "router.bias 3 values 12 B F32 3",
        "1.norm.weight 4 values 16 B F32 4",
        "scale 1 values 4 B F32 scalar",
        "exp_avg.layers.0.norm.weight 4 values 16 B F32 4",
    ]


def test_depth_folds_what_lies_deeper(tensors: dict[str, TensorEntry]) -> None:
    names = [line.split()[0] for line in tree_lines(grow_tree(tensors), depth=1)]
    assert names == ["layers", "scale", "exp_avg.layers.0.norm.weight"]


def test_a_depth_that_shows_nothing_is_refused(run_ernie5: Callable, tmp_path: Path) -> None:
    result = run_ernie5("inspect", tmp_path, "--depth", "0")
    assert result.exit_code == 2 and "--depth 0 shows nothing: give 1 or more" in result.stderr
