"""The initialisation table and the shard plan, over the names of a model with every part."""

from __future__ import annotations

import pytest
import torch

from ernie5.model.backbone import build_model
from ernie5.model.config import ModelConfig, MoEConfig, VisualModelConfig
from ernie5.model.init import std_of
from ernie5.model.shard_plan import SHARD_PLAN, placements_of


@pytest.fixture(scope="module")
def wide():
    config = ModelConfig(
        layers=5, width=96, query_heads=4, kv_heads=2, head_width=32, vocab_size=300, dense_layers=1, dense_width=64,
        tie_embeddings=False, moe=MoEConfig(num_experts=8, top_k=2, expert_width=32, shared_experts=1),
        visual=VisualModelConfig(vit_width=64, encoder_channels=64),
    )
    return config, build_model(config, seed=5)


def test_every_parameter_starts_with_the_standard_deviation_of_the_table(wide) -> None:
    config, model = wide
    for name, parameter in model.named_parameters():
        std = std_of(name, config=config)
        if std is None:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            allowance = 5 / parameter.numel() ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=allowance), name
    assert std_of("layers.0.attention.query.weight", config=config) == pytest.approx((0.3333 / 96) ** 0.5)
    assert std_of("layers.1.moe.experts.down", config=config) == pytest.approx((0.3333 / 96 / 10) ** 0.5)
    assert std_of("layers.1.attention.query_norm.weight", config=config) is None


def test_values_depend_on_seed_and_name_alone(wide) -> None:
    config, model = wide
    again, other = build_model(config, seed=5), build_model(config, seed=6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(model.text_weight, other.text_weight)
    layers = [model.get_parameter(f"layers.{i}.attention.query.weight") for i in (0, 1)]
    assert not torch.equal(*layers)


def test_parameter_names_are_unique_and_each_matches_exactly_one_placement(wide) -> None:
    names = [name for name, _ in wide[1].named_parameters()]
    assert len(names) == len(set(names))
    for name in names:
        assert len(placements_of(name)) == 1, (name, placements_of(name))
    unused = [p.pattern for p in SHARD_PLAN if not any(p in placements_of(name) for name in names)]
    assert not unused


def test_cut_dims_exist_and_fused_parts_split_evenly(wide) -> None:
    for name, parameter in wide[1].named_parameters():
        (placement,) = placements_of(name)
        for dim in (placement.tp_dim, placement.ep_dim):
            assert dim is None or dim < parameter.ndim, name
        if placement.tp_dim is not None:
            # Codec heads have an odd number of classes: their ranks hold rows of unlike number.
            pieces = 1 if name.startswith("audio_head.") else 2 * placement.fused
            assert parameter.shape[placement.tp_dim] % pieces == 0, name
