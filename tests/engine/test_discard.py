"""Dropping a finite update: after `discard` the engine stands where it stood, in every engine and stage."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def tiny() -> types.ModuleType:
    """The module that builds tiny engines."""
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.mark.parametrize("kind,stage,precision", [
    ("local", 0, "fp32"), ("local", 0, "bf16"), ("deepspeed", 0, "fp32"), ("deepspeed", 1, "fp32"),
    ("deepspeed", 2, "bf16"), ("deepspeed", 3, "fp32"),
])
def test_a_dropped_step_changes_nothing_and_the_next_one_trains(
    kind: str, stage: int, precision: str, tiny: types.ModuleType
) -> None:
    engine = tiny.make_engine(kind, stage=stage, precision=precision)
    engine.train_step(tiny.make_batches([1, 1, 1, 1]), learning_rate=1e-2)
    before = engine.state()
    sums = engine.accumulate(tiny.make_batches([1, 1, 1, 1], seed=1))
    assert bool(torch.isfinite(sums.objective))
    report = engine.discard(sums)
    after = engine.state()
    assert report.skipped and before.updates == after.updates
    for name in ("parameters", "moments", "buffers"):
        assert all(torch.equal(vars(after)[name][key], value) for key, value in vars(before)[name].items())
    assert torch.equal(before.magnitudes, after.magnitudes)
    assert not engine.train_step(tiny.make_batches([1, 1, 1, 1], seed=2), learning_rate=1e-2).skipped
    moved = engine.state().parameters
    assert any(not torch.equal(moved[name], value) for name, value in before.parameters.items())
