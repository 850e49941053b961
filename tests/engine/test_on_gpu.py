"""What only a GPU shows: the steps of the CPU, through the Triton kernels, and state that moves between the two."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch

from ernie5.engine.interface import KINDS, Engine
from ernie5.model.backbone import build_model
from ernie5.train.build import build_engine

pytestmark = pytest.mark.gpu
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "debug_run.py"
RATE = 1e-3


@pytest.fixture(scope="module")
def golden() -> types.ModuleType:
    """The module that runs the debug model on synthetic rows of every task."""
    spec = importlib.util.spec_from_file_location("debug_run", GOLDEN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _engine(golden: types.ModuleType, folder: Path, *, device: str, overrides: tuple[str, ...] = ()) -> Engine:
    config = golden.debug_config(overrides)
    model = build_model(config.model, seed=config.train.seed)
    return build_engine(config, model=model, device=torch.device(device), dp=1, run_dir=folder)


def _batches(golden: types.ModuleType, *, step: int) -> list:
    config = golden.debug_config()
    return [golden.synthetic_rows(config, number=2 * step + part) for part in range(2)]


def test_gradients_in_fp32_are_those_of_the_cpu(golden: types.ModuleType, tmp_path: Path) -> None:
    """Sums in another order differ by rounding, about 1e-6 of a tensor's largest gradient; a wrong kernel by far more.
    1e-3 leaves room for long sums that cancel."""
    found = []
    for device in ("cpu", "cuda"):
        engine = _engine(golden, tmp_path, device=device)
        sums = engine.accumulate(_batches(golden, step=0))
        found.append((float(sums.objective), {name: value.cpu() for name, value in engine.gradients().items()}))
    (objective, expected), (other, gradients) = found
    assert other == pytest.approx(objective, rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert (gradients[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-9, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_losses_in_fp32_follow_those_of_the_cpu(golden: types.ModuleType, tmp_path: Path, name: str) -> None:
    """Eight steps; rounding grows from step to step, for Muon faster: it iterates in bf16 on either device."""
    curves = []
    for device in ("cpu", "cuda"):
        engine = _engine(golden, tmp_path, device=device, overrides=(f"optim.name={name}",))
        reports = [engine.train_step(_batches(golden, step=step % 4), learning_rate=RATE) for step in range(8)]
        assert not any(report.skipped for report in reports)
        curves.append([float(report.sums.objective) for report in reports])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3 if name == "adamw" else 2e-2)


@pytest.mark.parametrize("settings", [
    ("engine.precision=bf16",),
    ("engine.precision=bf16", "optim.moments=8bit"),
    ("engine.precision=bf16", "optim.moments=8bit", "optim.stochastic_rounding=true"),
    ("engine.precision=bf16", "optim.name=muon"),
    ("engine.precision=bf16", "engine.recompute=full", "engine.offload_activations=[layers]"),
])
def test_losses_in_bf16_stay_near_those_in_fp32(
    golden: types.ModuleType, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """A bf16 number has 8 bits, so a loss over a thousand targets is off by well under one percent."""
    engines = [
        _engine(golden, tmp_path, device="cuda", overrides=overrides)
        for overrides in ((next((s for s in settings if s.startswith("optim.name")), "optim.name=adamw"),), settings)
    ]
    for step in range(4):
        reports = [engine.train_step(_batches(golden, step=step), learning_rate=RATE) for engine in engines]
        exact, narrow = (float(report.sums.objective) for report in reports)
        assert narrow == pytest.approx(exact, rel=2e-2)


def test_state_moves_to_the_cpu_and_back_bit_for_bit(golden: types.ModuleType, tmp_path: Path) -> None:
    on_gpu = _engine(golden, tmp_path, device="cuda")
    on_gpu.train_step(_batches(golden, step=0), learning_rate=RATE)
    state = on_gpu.state()
    for device in ("cpu", "cuda"):
        other = _engine(golden, tmp_path, device=device)
        other.load_state(state)
        again = other.state()
        assert again.updates == state.updates == 1 and torch.equal(again.magnitudes, state.magnitudes)
        for kind in KINDS:
            for name, value in state.tensors(kind).items():
                assert torch.equal(again.tensors(kind)[name], value), name


def test_evaluation_on_the_gpu_gives_the_losses_of_the_cpu(golden: types.ModuleType, tmp_path: Path) -> None:
    values = [
        float(_engine(golden, tmp_path, device=device).evaluate_batch(_batches(golden, step=0)[0]).objective)
        for device in ("cpu", "cuda")
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
