"""What is computed again in backward gives the same gradients bit for bit, draws the same numbers, is kept nowhere."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from ernie5.engine.config import OPERATORS, EngineConfig
from ernie5.engine.interface import StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.engine.recompute import find_parts, install_recompute, offload_part, repeat_part
from ernie5.errors import ConfigError
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import ModelConfig
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import uniform_magnitudes
from ernie5.optim.config import OptimConfig

SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
TINY = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TINY)
CPU = torch.device("cpu")


def rich_model() -> ModelConfig:
    """A dense layer, shared experts, an MTP block and every loss of balance."""
    balance = dataclasses.replace(TINY.MODEL.moe.balance, switch_loss=True, z_loss=True)
    moe = dataclasses.replace(TINY.MODEL.moe, shared_experts=1, balance=balance)
    return dataclasses.replace(TINY.MODEL, dense_layers=1, moe=moe)


def build() -> UnifiedModel:
    """The same weights in every call, and attention that draws random numbers in training."""
    model = build_model(rich_model(), seed=3)
    for layer in model.layers:
        layer.attention.output.register_forward_hook(
            lambda module, _, out: torch.nn.functional.dropout(out, p=0.2, training=module.training)
        )
    return model


def run_step(model: UnifiedModel) -> dict[str, torch.Tensor]:
    """Gradients, loads and losses of two micro-batches."""
    settings = StepSettings(
        objectives=ObjectivesConfig(switch_weight=0.1, z_weight=0.01), clip_norm=1.0, balance_speed=0.01,
        magnitudes=uniform_magnitudes(vocab_size=TINY.MODEL.vocab_size, audio_codes=TINY.MODEL.audio.codes),
    )
    engine = LocalEngine(model, optim=OptimConfig(), settings=settings, precision="fp32", device=CPU)
    torch.manual_seed(5)
    sums = engine.accumulate(TINY.make_batches([2, 1]))
    drawn = torch.rand(3)
    evaluated = engine.evaluate_batch(TINY.make_batches([1], seed=4)[0])
    return {**engine.gradients(), "loads": sums.routing.group_loads, "objective": sums.objective,
            "next draw": drawn, "evaluated": evaluated.objective}


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """Nothing repeated."""
    return run_step(build())


def check_equal(found: dict[str, torch.Tensor], *, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("engine", [
    EngineConfig(recompute="full"),
    EngineConfig(recompute="selective", recompute_parts=OPERATORS),
], ids=lambda engine: engine.recompute)
def test_gradients_loads_and_draws_are_those_without_recompute(engine: EngineConfig, plain: dict) -> None:
    model = build()
    install_recompute(model, engine=engine, device=CPU)
    check_equal(run_step(model), expected=plain)


def test_parts_that_wait_in_another_memory_come_back_the_same(plain: dict) -> None:
    model = build()
    moved = []
    repeat_part(model, name="layers")
    offload_part(model, name="layers", is_moved=lambda tensor: bool(moved.append(tensor.shape)) or True)
    check_equal(run_step(model), expected=plain)
    filled = [shape for shape in moved if shape.numel()]  # torch before 2.13 keeps an empty tensor beside each input
    tokens = [shape[:2] for shape in filled if len(shape) == 3]
    assert len(tokens) == len(filled) == 2 * 4  # two micro-batches: the input of three layers and of the MTP block


def test_every_name_has_its_parts() -> None:
    model = build()
    found = {name: [attribute for _, attribute in find_parts(model, name=name)] for name in ("layers", *OPERATORS)}
    assert found == {
        "layers": ["forward"] * 4, "attention": ["attend"] * 4, "experts": ["run_experts"] * 2,
        "feed_forward": ["feed_forward", "run_shared", "run_shared", "feed_forward"],
    }


def test_repeated_layers_keep_their_inputs_and_nothing_else() -> None:
    """Counted where autograd asks for room: full recompute asks for one [B, T, D] per layer."""
    kept: dict[str, int] = {}
    for name in ("none", "full"):
        model = build_model(rich_model(), seed=3)
        install_recompute(model, engine=EngineConfig(recompute=name), device=CPU)
        model.train()
        batch = TINY.make_batches([2])[0]
        inputs = model.layer_inputs(batch.positions, intervals=batch.intervals, kinds=batch.kinds)
        hidden = torch.randn(*batch.token_ids.shape, model.config.width, requires_grad=True)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict = sizes) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for layer in model.layers:
                hidden = layer(hidden, inputs=inputs)[0]
        kept[name] = sum(sizes.values())
    assert kept["full"] == 3 * 2 * 160 * 32 * 4
    assert kept["none"] > 8 * kept["full"]


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"offload_activations.*device of this run is cpu"):
        install_recompute(build(), engine=EngineConfig(offload_activations=("experts",)), device=CPU)
    with pytest.raises(ConfigError, match="recompute_parts"):
        EngineConfig(recompute="selective", recompute_parts=())
    with pytest.raises(ConfigError, match=r"recompute.*zero_stage: 1"):
        EngineConfig(recompute="full", zero_stage=0, precision="bf16")
