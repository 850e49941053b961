"""Dropping an update: after it the engine stands where it stood, and the next step is what it would have been."""

from __future__ import annotations

import importlib.util
import math
import types
from pathlib import Path

import pytest
import torch

from ernie5.engine import micro_step
from ernie5.engine.interface import Engine, StepReport


@pytest.fixture(scope="module")
def tiny() -> types.ModuleType:
    """The module that builds tiny engines."""
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


CASES = [
    ("local", 0, "fp32", "none"), ("local", 0, "bf16", "none"), ("deepspeed", 0, "fp32", "none"),
    ("deepspeed", 1, "fp32", "none"), ("deepspeed", 1, "bf16", "none"), ("deepspeed", 2, "bf16", "none"),
    ("deepspeed", 3, "fp32", "none"), ("deepspeed", 1, "bf16", "cpu"), ("deepspeed", 2, "bf16", "cpu"),
    ("deepspeed", 2, "fp32", "cpu"), ("deepspeed", 3, "bf16", "cpu"),
]


def drop(engine: Engine, *, tiny: types.ModuleType) -> StepReport:
    """A finite step that is discarded."""
    sums = engine.accumulate(tiny.make_batches([1], seed=1))
    assert bool(torch.isfinite(sums.objective))
    return engine.discard(sums)


def overflow(engine: Engine, *, tiny: types.ModuleType) -> StepReport:
    """A step whose gradients are NaN."""
    with pytest.MonkeyPatch.context() as patch:
        combine = micro_step.combine
        patch.setattr(micro_step, "combine", lambda *terms, **named: combine(*terms, **named) * math.nan)
        return engine.train_step(tiny.make_batches([1], seed=1), learning_rate=1e-2)


@pytest.mark.parametrize("lose", [drop, overflow])
@pytest.mark.parametrize("kind,stage,precision,offload", CASES)
def test_a_dropped_step_changes_nothing_and_the_next_one_is_as_if_it_had_not_been(
    kind: str, stage: int, precision: str, offload: str, lose: types.FunctionType, tiny: types.ModuleType
) -> None:
    found = []
    for is_dropping in (True, False):
        engine = tiny.make_engine(kind, stage=stage, precision=precision, offload=offload, micro=1)
        engine.train_step(tiny.make_batches([1]), learning_rate=1e-2)
        if is_dropping:
            before = engine.state()
            report = lose(engine, tiny=tiny)
            after = engine.state()
            assert report.skipped and before.updates == after.updates
            for name in ("parameters", "moments", "buffers"):
                assert all(torch.equal(vars(after)[name][key], value) for key, value in vars(before)[name].items())
            assert torch.equal(before.magnitudes, after.magnitudes)
        report = engine.train_step(tiny.make_batches([1], seed=2), learning_rate=1e-2)
        assert not report.skipped
        found.append((float(report.grad_norm), engine.state()))
    assert found[0][0] == found[1][0]
    for name in ("parameters", "moments", "buffers"):
        other = vars(found[1][1])[name]
        assert all(torch.equal(value, other[key]) for key, value in vars(found[0][1])[name].items())
