"""Counts, rules and the absence of torch in the model's configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ernie5.errors import ConfigError
from ernie5.model.backbone import build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, MTPConfig, num_active_params, num_params

VARIANTS = (
    {},
    {"tie_embeddings": False, "qk_norm": False},
    {"dense_layers": 2, "mtp": MTPConfig(depth=0)},
    {"modalities": ("text",)},
    {"modalities": ("text", "image")},
    {"modalities": ("text", "audio"), "moe": MoEConfig(num_experts=3, top_k=1, expert_width=5)},
)


@pytest.mark.parametrize("changes", VARIANTS)
def test_num_params_equals_the_built_model(configs, changes: dict) -> None:
    config = configs(**changes)
    model = build_model(config, seed=0)
    assert sum(p.numel() for p in model.parameters()) == num_params(config)
    without = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))
    assert without == num_params(config, with_mtp=False)


def test_the_flagship_and_ernie_45_counts_are_those_published() -> None:
    flagship = ModelConfig(
        layers=72, width=8192, query_heads=64, kv_heads=8, head_width=128, vocab_size=200_000, tie_embeddings=False,
        dense_width=28672, moe=MoEConfig(num_experts=384, top_k=8, expert_width=3584),
    )
    assert num_params(flagship, with_mtp=False) == pytest.approx(2.45e12, rel=0.01)
    assert num_active_params(flagship) / num_params(flagship, with_mtp=False) < 0.03
    ernie45 = ModelConfig(
        layers=28, width=2560, query_heads=20, kv_heads=4, head_width=128, vocab_size=103_424, qk_norm=False,
        dense_layers=1, dense_width=12288, modalities=("text",), mtp=MTPConfig(depth=0),
        moe=MoEConfig(num_experts=64, top_k=6, expert_width=1536, shared_experts=2),
    )
    assert num_params(ernie45) == pytest.approx(21.8e9, rel=0.005)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "does not divide query_heads"),
        ({"dense_layers": 9}, "exceeds layers"),
        ({"audio": AudioModelConfig(levels=5)}, "too few for audio.levels"),
        ({"modalities": ("image",)}, "text is missing"),
        ({"head_width": 7}, "even"),
    ],
)
def test_impossible_shapes_are_refused_with_the_rule(configs, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs(**changes)


def test_the_configuration_does_not_import_torch() -> None:
    code = "import sys, ernie5.model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
