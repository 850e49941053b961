"""DeepSpeed in every ZeRO stage and precision does what the local engine does: losses, gradients, state."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch

from ernie5.engine import deepspeed_start
from ernie5.engine.config import EngineConfig
from ernie5.engine.deepspeed_config import DeepSpeedPlan, deepspeed_config
from ernie5.engine.deepspeed_state import DeepSpeedState
from ernie5.errors import NumericsError
from ernie5.optim.config import OptimConfig
from ernie5.parallel import verify

HERE = Path(__file__).parent
# fp32 sums in another order: gradients of a few thousand terms of size 1e-2 differ by less than this.
GRADIENT_TOLERANCE = 2e-6
# two AdamW steps at rate 1e-2: g / sqrt(v) magnifies the rounding of a gradient that is nearly zero.
PARAMETER_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def tiny() -> types.ModuleType:
    """The module that builds tiny engines."""
    spec = importlib.util.spec_from_file_location("tiny_run", HERE / "tiny_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.fixture(scope="module")
def local_result(tiny: types.ModuleType) -> dict:
    """Two steps of the yardstick."""
    return tiny.two_steps(tiny.make_engine("local"))


def assert_same_steps(result: dict, *, expected: dict) -> None:
    assert set(result["gradients"]) == set(expected["gradients"])
    for name, gradient in expected["gradients"].items():
        assert (result["gradients"][name] - gradient).abs().max() < GRADIENT_TOLERANCE, name
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    for step, losses in enumerate(expected["losses"]):
        assert result["losses"][step] == pytest.approx(losses, rel=1e-4), step
    for name, value in expected["state"].parameters.items():
        assert (result["state"].parameters[name] - value).abs().max() < PARAMETER_TOLERANCE, name
    for name, value in expected["state"].moments.items():
        assert (result["state"].moments[name] - value).abs().max() < GRADIENT_TOLERANCE, name
    for name, value in expected["state"].buffers.items():
        assert torch.equal(result["state"].buffers[name], value), name
    assert torch.equal(result["loads"], expected["loads"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_equals_local_parameter_by_parameter(
    stage: int, tiny: types.ModuleType, local_result: dict
) -> None:
    assert_same_steps(tiny.two_steps(tiny.make_engine("deepspeed", stage=stage)), expected=local_result)


def run_ranks(tmp_path: Path, *, stages: list[int], ranks: int) -> dict[int, dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"stages": stages, "ranks": ranks, "out": str(tmp_path / "out.pt"),
                               "bucket_elements": 5000}))
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "tiny_run.py"), str(job)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return torch.load(tmp_path / "out.pt", weights_only=False)


def test_two_ranks_with_other_modalities_equal_one_local_process(tmp_path: Path, local_result: dict) -> None:
    total = sum(value.numel() for value in local_result["state"].parameters.values())
    results = run_ranks(tmp_path, stages=[0, 1, 2, 3], ranks=2)
    for stage, result in results.items():
        assert_same_steps(result, expected=local_result)
        assert result["resident_elements"] == (0 if stage == 3 else total)
        assert result["evaluated"] == pytest.approx(results[0]["evaluated"], rel=1e-4)
        assert torch.allclose(result["hidden_by_hand"], results[0]["hidden_by_hand"], atol=1e-3)
    for kind in ("parameters", "moments", "buffers"):
        for name, value in getattr(results[3]["state"], kind).items():
            assert torch.equal(getattr(results[3]["copied_state"], kind)[name], value), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_masters_follow_the_local_bf16_engine(stage: int, tiny: types.ModuleType) -> None:
    expected = tiny.two_steps(tiny.make_engine("local", precision="bf16"))
    result = tiny.two_steps(tiny.make_engine("deepspeed", stage=stage, precision="bf16"))
    assert result["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-6)
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max() + 1e-6
        # a bf16 number has 8 bits: sums of four micro-batches differ by one part in 2^7 at most
        assert (result["gradients"][name] - gradient).abs().max() / scale < 2**-7, name
    assert result["state"].buffers.keys() == expected["state"].buffers.keys()
    assert all(value.dtype == torch.float32 for value in result["state"].buffers.values())


@pytest.mark.parametrize(
    "stage,optimizer", [(0, "adamw"), (1, "adamw"), (2, "adamw"), (3, "adamw"), (1, "muon"), (2, "muon"), (3, "muon")]
)
def test_state_moves_between_engines_without_a_difference(
    stage: int, optimizer: str, tiny: types.ModuleType
) -> None:
    source = tiny.make_engine("local", optimizer=optimizer)
    for step in range(2):
        source.train_step(tiny.make_batches([1, 1, 1, 1], seed=step), learning_rate=1e-2)
    state = source.state()
    engine = tiny.make_engine("deepspeed", stage=stage, optimizer=optimizer)
    engine.load_state(state)
    back = engine.state()
    assert set(back.moments) == set(state.moments)
    for name, value in state.parameters.items():
        assert torch.equal(back.parameters[name], value), name
    for name, value in state.moments.items():
        assert torch.equal(back.moments[name], value), name
    assert back.updates == state.updates and torch.equal(back.magnitudes, state.magnitudes)
    batches = tiny.make_batches([1, 1, 1, 1], seed=9)
    expected, found = source.accumulate(batches), engine.accumulate(batches)
    assert float(found.objective) == pytest.approx(float(expected.objective), rel=1e-6)
    source.update(expected, learning_rate=1e-2)
    engine.update(found, learning_rate=1e-2)
    for name, value in source.state().parameters.items():
        assert (engine.state().parameters[name] - value).abs().max() < PARAMETER_TOLERANCE, name


@pytest.mark.parametrize("kind,stage", [("local", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2),
                                        ("deepspeed", 3)])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, stage: int, tiny: types.ModuleType) -> None:
    engine = tiny.make_engine(kind, stage=stage)
    engine.train_step(tiny.make_batches([1, 1, 1, 1]), learning_rate=1e-2)
    before = engine.state()
    hook = engine.model.final_norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    report = engine.train_step(tiny.make_batches([1, 1, 1, 1], seed=1), learning_rate=1e-2)
    hook.remove()
    after = engine.state()
    assert report.skipped
    for kind_before, kind_after in ((before.parameters, after.parameters), (before.moments, after.moments),
                                    (before.buffers, after.buffers)):
        assert all(torch.equal(kind_after[name], value) for name, value in kind_before.items())
    assert torch.equal(before.magnitudes, after.magnitudes) and before.updates == after.updates
    assert not engine.train_step(tiny.make_batches([1, 1, 1, 1], seed=2), learning_rate=1e-2).skipped


def test_stage_3_holds_a_layer_whole_only_while_it_runs(tiny: types.ModuleType) -> None:
    engine = tiny.make_engine("deepspeed", stage=3)
    lower, upper = engine.model.layers[0], engine.model.layers[2]
    seen: list[tuple[int, int]] = []
    upper.attention.register_forward_hook(
        lambda *_: seen.append((sum(p.numel() for p in lower.parameters()), sum(p.numel() for p in upper.parameters())))
    )
    engine.train_step(tiny.make_batches([1, 1, 1, 1]), learning_rate=1e-2)
    assert all(below == 0 and above > 0 for below, above in seen) and len(seen) == 4


@pytest.mark.parametrize("stage", [2, 3])
def test_the_model_can_be_run_by_hand_between_steps(stage: int, tiny: types.ModuleType) -> None:
    local, engine = tiny.make_engine("local"), tiny.make_engine("deepspeed", stage=stage)
    batch, outputs = tiny.make_batches([1], seed=7)[0], []
    for one in (local, engine):
        one.train_step(tiny.make_batches([1, 1, 1, 1]), learning_rate=1e-3)
        with one.whole_model(), torch.no_grad():
            outputs.append(one.model(batch).text_hidden)
        report = one.train_step(tiny.make_batches([1, 1, 1, 1], seed=1), learning_rate=1e-3)
        outputs.append(report.grad_norm)
        outputs.append(one.evaluate_batch(batch).objective)
    for expected, found in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_gradients_arrive_layer_by_layer_in_the_same_order_for_any_modalities(tiny: types.ModuleType) -> None:
    engine = tiny.make_engine("deepspeed", stage=2)
    engine.accumulate(tiny.make_batches([1, 1, 1, 1]))  # text alone, and all tasks, in turn
    arrived = engine._ordered._arrived
    # indices count what surrounds the layers, then the layers from the lowest: the reverse of this is backward's order
    assert arrived == 4 * list(reversed(range(len(arrived) // 4)))


def test_ranks_that_disagree_about_the_order_of_gradients_stop(tiny: types.ModuleType) -> None:
    engine = tiny.make_engine("deepspeed", stage=2)
    engine.accumulate(tiny.make_batches([1, 1, 1, 1]))
    with pytest.raises(NumericsError, match="different orders"):
        engine._ordered.check_order(
            largest=lambda values: torch.maximum(values, torch.tensor([5, -3])), device=engine.device
        )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_of_an_odd_number_of_parameters_gets_even_buckets(stage: int) -> None:
    plan = DeepSpeedPlan(1, 1, dp=1, num_params=11, layer_params=5, sub_group_elements=3, pin_memory=False)
    told = deepspeed_config(EngineConfig(zero_stage=stage), optim=OptimConfig(), plan=plan)["zero_optimization"]
    assert told["allgather_bucket_size"] == 12, "DeepSpeed's stages 1 and 2 assert that it is even"


@pytest.mark.parametrize("stage", [1, 3])
def test_the_check_of_copies_has_one_whole_parameter_at_a_time(
    tiny: types.ModuleType, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    engine = tiny.make_engine("deepspeed", stage=stage)
    state, plain, read = engine.layout.state, DeepSpeedState._read, []
    alive = []

    def note(self: DeepSpeedState, parameter: torch.nn.Parameter, *, key: str | None) -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in read))
        found = plain(self, parameter, key=key)
        read.append(weakref.ref(found))
        return found

    def meet(found: list, own: dict) -> None:
        found[:] = [own] * len(found)

    monkeypatch.setattr(DeepSpeedState, "_read", note)
    monkeypatch.setattr(verify.dist, "all_gather_object", meet)
    monkeypatch.setattr(
        engine.layout, "state", dataclasses.replace(state, world=dataclasses.replace(state.world, ranks=(0, 1)))
    )
    engine.check_copies()
    assert len(alive) == len(engine.layout.shards) and max(alive) <= 1  # that of the step before


def test_stage_three_draws_a_parameter_when_no_other_one_is_whole(
    tiny: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {}
    plain = deepspeed_start.draw_part

    def draw(model: torch.nn.Module, *, name: str, **how: object) -> torch.Tensor:
        held[name] = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
        return plain(model, name=name, **how)

    monkeypatch.setattr(deepspeed_start, "draw_part", draw)
    engine = tiny.make_engine("deepspeed", stage=3)
    assert set(held) == set(engine.layout.shards)
    assert max(held.values()) <= 4 * len(held)  # stand-ins, one fp32 element each
