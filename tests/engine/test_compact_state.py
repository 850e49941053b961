"""Steps with 8-bit moments and without fp32 masters: near those with all, resumed bit for bit, refused elsewhere."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_run
from ernie5.checkpoint.manifest import RunState
from ernie5.checkpoint.save import Contents, save_checkpoint
from ernie5.config.load import load_config
from ernie5.config.registry import resolve
from ernie5.errors import CheckpointError, ConfigError
from ernie5_kernels.testing import assert_close

OPTIONS = ({"moments": "8bit"}, {"rounding": True}, {"moments": "8bit", "rounding": True})


def train(tiny: types.ModuleType, engine: object, *, steps: range, micro: int = 1) -> list[float]:
    losses = []
    for step in steps:
        report = engine.train_step(tiny.make_batches([2] * micro, seed=step % 2), learning_rate=3e-3)
        losses.append(float(report.sums.objective))
    return losses


@pytest.mark.parametrize("options", OPTIONS, ids=("8bit", "rounding", "both"))
def test_losses_stay_near_those_with_fp32_masters_and_moments(tiny: types.ModuleType, options: dict) -> None:
    full, small = tiny.make_engine("local", precision="bf16"), tiny.make_engine("local", precision="bf16", **options)
    expected, losses = (train(tiny, engine, steps=range(10)) for engine in (full, small))
    assert losses[0] == expected[0], "the same bf16 weights at the start"
    fallen = expected[0] - expected[8]
    assert fallen > 0.1
    for one, other in zip(losses[6:], expected[6:], strict=True):
        assert abs(one - other) < 0.15 * fallen, "noise of rounding, small beside what was learned"


@pytest.mark.parametrize("options", OPTIONS, ids=("8bit", "rounding", "both"))
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(
    tiny: types.ModuleType, options: dict, tmp_path: Path
) -> None:
    engine = tiny.make_engine("local", precision="bf16", **options)
    train(tiny, engine, steps=range(3), micro=2)
    run = RunState(step=3, tokens=1, data={}, rng={}, spikes=0)
    contents = Contents(
        tuple(engine.slices()), engine.updates, engine.magnitudes.clone(), run, "train: {}\n", "bf16", {}
    )
    save_checkpoint(tmp_path, contents=contents, config=CheckpointConfig())
    again = tiny.make_engine("local", precision="bf16", **options)
    again.load_state(load_run(tmp_path).engine)
    losses = [train(tiny, one, steps=range(3, 6)) for one in (engine, again)]
    assert losses[0] == losses[1]
    left, right = engine.state(), again.state()
    for part in ("parameters", "moments", "buffers"):
        assert vars(left)[part].keys() == vars(right)[part].keys()
        assert all(torch.equal(value, vars(right)[part][key]) for key, value in vars(left)[part].items())
    for (name, weight), other in zip(engine.model.named_parameters(), again.model.parameters(), strict=True):
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, other), name


def test_8_bit_moments_do_not_load_into_fp32_ones(tiny: types.ModuleType) -> None:
    saved = tiny.make_engine("local", moments="8bit").state()
    with pytest.raises(CheckpointError, match=r"exp_avg/.* is missing.*optim\.moments.*init_from"):
        tiny.make_engine("local").load_state(saved)


def test_weights_without_masters_go_on_with_masters_and_back(tiny: types.ModuleType) -> None:
    rounded = tiny.make_engine("local", precision="bf16", rounding=True)
    train(tiny, rounded, steps=range(2))
    full = tiny.make_engine("local", precision="bf16")
    full.load_state(rounded.state())
    again = tiny.make_engine("local", precision="bf16", rounding=True)
    again.load_state(full.state())
    for one, other, third in zip(
        rounded.model.parameters(), full.model.parameters(), again.model.parameters(), strict=True
    ):
        assert torch.equal(one, other) and torch.equal(one, third)


@pytest.mark.parametrize("rows", [[2], [1, 1]])
def test_gradients_of_several_micro_batches_add_up_in_fp32(tiny: types.ModuleType, rows: list[int]) -> None:
    full = tiny.make_engine("local", precision="bf16")
    small = tiny.make_engine("local", precision="bf16", rounding=True)
    for engine in (full, small):
        engine.accumulate(tiny.cut_rows(rows))
    expected = full.gradients()
    for name, gradient in small.gradients().items():
        reason = "a weight used twice: its two gradients are added before or after they are rounded to bf16"
        assert_close(gradient, expected=expected[name], tolerance=2**-6, reason=reason)
    kinds = {parameter.grad.dtype for parameter in small.model.parameters()}
    assert kinds == ({torch.bfloat16} if len(rows) == 1 else {torch.float32})


def test_a_step_that_is_not_finite_moves_nothing(tiny: types.ModuleType) -> None:
    engine = tiny.make_engine("local", precision="bf16", **OPTIONS[2])
    train(tiny, engine, steps=range(1))
    before = engine.state()
    engine.discard(engine.accumulate(tiny.make_batches([2])))
    after = engine.state()
    assert all(torch.equal(after.parameters[key], value) for key, value in before.parameters.items())
    assert all(torch.equal(after.moments[key], value) for key, value in before.moments.items())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (("engine.kind=deepspeed", "optim.moments=8bit"), "optim.moments.*only the local engine.*deepspeed"),
        (("engine.kind=grid", "optim.stochastic_rounding=true"), "stochastic_rounding.*only the local engine.*grid"),
        (("engine.kind=local", "engine.precision=fp32", "optim.stochastic_rounding=true"), "precision is fp32"),
        (("engine.kind=local", "optim.name=muon", "optim.moments=8bit"), "muon keeps fp32"),
    ],
)
def test_what_would_be_ignored_is_refused(settings: tuple[str, ...], text: str, repository: Path) -> None:
    path = repository / "configs" / "pretrain" / "debug.yaml"
    plain = ("engine.zero_stage=1", "optim.name=adamw")
    with pytest.raises(ConfigError, match=text):
        load_config(path, schema=resolve("root", name="train"), overrides=(*plain, *settings))
