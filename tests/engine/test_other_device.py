"""No step mixes tensors of two devices: what would stop the first run on a GPU stops here, without one."""

from __future__ import annotations

import types

import pytest
import torch

from ernie5.engine.interface import StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.engine.peers import peers_along
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import uniform_magnitudes
from ernie5.optim.config import OptimConfig
from ernie5.optim.flat_muon import FlatMuon
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.spread import Spread, Team
from ernie5.parallel.state import Axis, Traffic
from ernie5.records import TensorRecord


def _make_engine(tiny: types.ModuleType, *, optimizer: str, device: torch.device) -> LocalEngine:
    magnitudes = uniform_magnitudes(vocab_size=tiny.MODEL.vocab_size, audio_codes=tiny.MODEL.audio.codes)
    settings = StepSettings(
        objectives=ObjectivesConfig(), clip_norm=0.05, balance_speed=0.01, magnitudes=magnitudes
    )
    model = build_model(tiny.MODEL, seed=3)
    optim = OptimConfig(learning_rate=1e-2, name=optimizer)
    return LocalEngine(model, optim=optim, settings=settings, precision="fp32", device=device)


def test_the_device_refuses_a_mixture_and_computes_otherwise(other_device: types.ModuleType) -> None:
    with other_device.other_device():
        one = torch.ones(3, device=other_device.DEVICE)
        assert (one * 2 + torch.tensor(1.0)).sum().item() == 9.0
        with pytest.raises(RuntimeError, match="two devices"):
            one + torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            torch.ones(3)[torch.tensor([0], device=other_device.DEVICE)]
        with pytest.raises(TypeError, match="numpy"):
            one.numpy()
        assert torch.equal(one.cpu(), torch.ones(3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_there_is_that_of_the_cpu(
    tiny: types.ModuleType, other_device: types.ModuleType, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """The values are computed by the same library in other back ends: fp32 sums differ by rounding alone."""
    batches = tiny.make_batches([2, 1])
    expected = _make_engine(tiny, optimizer=optimizer, device=torch.device("cpu"))
    reports = [expected.train_step(batches, learning_rate=1e-2) for _ in range(2)]
    evaluated = float(expected.evaluate_batch(batches[0]).objective)
    monkeypatch.setattr(UnifiedModel, "to", lambda model, device: other_device.bring(model))
    monkeypatch.setattr(TensorRecord, "to", lambda record, device: record.map_tensors(other_device.carry))
    with other_device.other_device():
        engine = _make_engine(tiny, optimizer=optimizer, device=other_device.DEVICE)
        for report in reports:
            found = engine.train_step(batches, learning_rate=1e-2)
            assert found.sums.objective.device == other_device.DEVICE
            assert float(found.sums.objective) == pytest.approx(float(report.sums.objective), rel=1e-4)
        found = float(engine.evaluate_batch(batches[0]).objective)
        assert found == pytest.approx(evaluated, rel=4e-4)  # Muon's bf16 iterations turn other roundings into 1e-4
        state = engine.state()
        engine.load_state(state)
    assert all(value.device.type == "cpu" for value in (*state.parameters.values(), *state.moments.values()))


def test_muon_iterates_there_what_the_host_keeps(other_device: types.ModuleType) -> None:
    start, slope = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).unbind()
    moved = {}
    with other_device.other_device():
        for device in (torch.device("cpu"), other_device.DEVICE):
            team = Team(copies=peers_along(Axis("edp", (0,), 0, None, Traffic(), (0,)), device=device))
            group = ParameterGroup("matrix", ("a.weight",), (torch.nn.Parameter(start),), 0.1, is_matrix=True)
            config, spreads = OptimConfig(name="muon", learning_rate=0.1), {"a.weight": Spread(start.shape, team)}
            optimizer = FlatMuon([group], config=config, spreads=spreads)
            piece = torch.nn.Parameter(start.flatten().clone())
            piece.grad, optimizer.param_groups[0]["params"] = slope.flatten(), [piece]
            optimizer.step()
            moved[device.type] = piece.detach()
    here, there = moved.values()
    assert len(moved) == 2 and here.device == there.device == torch.device("cpu")
    assert not torch.equal(here, start.flatten()) and torch.allclose(here, there, atol=1e-3)
