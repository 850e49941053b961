"""Optimizer state in the host's memory: the same numbers in every ZeRO stage, and what would not be is refused."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch

from ernie5.engine.config import EngineConfig
from ernie5.engine.deepspeed_config import DeepSpeedPlan, deepspeed_config
from ernie5.engine.interface import MOMENT, PARAMETER, Engine
from ernie5.errors import ConfigError, EnvironmentFault
from ernie5.optim.config import OptimConfig

# as in test_deepspeed_equals_local: sums of fp32 in another order; AdamW divides by sqrt(v)
GRADIENT_TOLERANCE, PARAMETER_TOLERANCE = 2e-6, 2e-4


@pytest.fixture(scope="module")
def tiny() -> types.ModuleType:
    """The module that builds tiny engines."""
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def expected(tiny: types.ModuleType) -> dict:
    """Two steps of the local engine."""
    return tiny.two_steps(tiny.make_engine("local"))


def check_dropped_step(engine: Engine, *, tiny: types.ModuleType) -> None:
    """A step that is dropped moves nothing."""
    before = engine.state()
    report = engine.discard(engine.accumulate(tiny.make_batches([1, 1, 1, 1], seed=5)))
    after = engine.state()
    assert report.skipped
    for kind in ("parameters", "moments"):
        assert all(torch.equal(vars(after)[kind][key], value) for key, value in vars(before)[kind].items())


@pytest.mark.parametrize("stage,offload", [(1, "cpu"), (2, "cpu"), (3, "cpu"), (3, "nvme")])
def test_a_step_on_the_host_is_the_local_step(
    stage: int, offload: str, tiny: types.ModuleType, expected: dict, tmp_path: Path
) -> None:
    place = {"offload": offload, "nvme_path": tmp_path / "new" / "folder" if offload == "nvme" else None}
    engine = tiny.make_engine("deepspeed", stage=stage, **place)
    result = tiny.two_steps(engine)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for name, gradient in expected["gradients"].items():
        assert (result["gradients"][name] - gradient).abs().max() < GRADIENT_TOLERANCE, name
    for name, value in expected["state"].parameters.items():
        assert (result["state"].parameters[name] - value).abs().max() < PARAMETER_TOLERANCE, name
    for name, value in expected["state"].moments.items():
        assert (result["state"].moments[name] - value).abs().max() < GRADIENT_TOLERANCE, name
    check_dropped_step(engine, tiny=tiny)
    copy = tiny.make_engine("deepspeed", stage=stage, **place)
    copy.load_state(result["state"])
    for kind in ("parameters", "moments"):
        for name, value in vars(result["state"])[kind].items():
            assert torch.equal(vars(copy.state())[kind][name], value), name


def test_stage_2_in_bf16_adds_up_micro_batches_on_the_host_as_without_it(tiny: types.ModuleType) -> None:
    there, here = (tiny.two_steps(tiny.make_engine("deepspeed", stage=2, precision="bf16", offload=offload))
                   for offload in ("cpu", "none"))
    assert all(torch.equal(there["gradients"][name], value) for name, value in here["gradients"].items())
    for kind in ("parameters", "moments"):
        for name, value in vars(here["state"])[kind].items():
            assert torch.equal(vars(there["state"])[kind][name], value), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_masters_and_moments_are_in_nameless_files_of_the_drive(
    tiny: types.ModuleType, tmp_path: Path, optimizer: str
) -> None:
    engine = tiny.make_engine("deepspeed", stage=3, offload="nvme", nvme_path=tmp_path, optimizer=optimizer)
    engine.train_step(tiny.make_batches([1, 1, 1, 1]), learning_rate=1e-2)
    assert list(tmp_path.iterdir()) == []
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path) in line and line.endswith("(deleted)"):
            mapped.append(tuple(int(end, 16) for end in line.split()[0].split("-")))
    pieces = [piece for piece in engine.slices() if piece.kind in (PARAMETER, MOMENT) and piece.values.numel()]
    assert len(pieces) > 100 and {piece.kind for piece in pieces} == {PARAMETER, MOMENT}
    for piece in pieces:
        assert any(start <= piece.values.data_ptr() < stop for start, stop in mapped), piece.key


def test_a_folder_that_cannot_take_the_state_is_named(tiny: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"/file cannot take .*: a file stands where .*offload_optimizer: cpu"):
        tiny.make_engine("deepspeed", stage=3, offload="nvme", nvme_path=tmp_path / "file")


def test_deepspeed_is_told_where_the_state_is() -> None:
    plan = DeepSpeedPlan(1, 1, dp=1, num_params=10, layer_params=5, sub_group_elements=3, pin_memory=True)
    told = deepspeed_config(EngineConfig(zero_stage=2, offload_optimizer="cpu"), optim=OptimConfig(), plan=plan)
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    told = deepspeed_config(EngineConfig(zero_stage=2), optim=OptimConfig(), plan=plan)
    assert "offload_optimizer" not in told["zero_optimization"]


def test_what_would_train_otherwise_or_not_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nvme_path = null: .* needs a folder .* Set engine.nvme_path"):
        EngineConfig(zero_stage=3, offload_optimizer="nvme")
    with pytest.raises(ConfigError, match=r"nvme_path = '/nvme': offload_optimizer = cpu writes nothing there"):
        EngineConfig(zero_stage=3, offload_optimizer="cpu", nvme_path="/nvme")
    for stage in (1, 2):
        with pytest.raises(ConfigError, match=f"zero_stage {stage} keeps views"):
            EngineConfig(zero_stage=stage, offload_optimizer="nvme", nvme_path="/nvme")
    for kind, stage in (("grid", 1), ("deepspeed", 0)):
        with pytest.raises(ConfigError, match=f"the engine is {kind} with zero_stage {stage}"):
            EngineConfig(kind=kind, zero_stage=stage, offload_optimizer="cpu")
    with pytest.raises(ConfigError, match="gradients of 4 micro-batches in bf16"):
        EngineConfig(zero_stage=1, precision="bf16", offload_optimizer="cpu").check_micro_batches(4)
