"""The published sizes of known models come out of our counting, and every shipped config validates without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ernie5.config.load import config_from_dict, config_to_dict, load_config
from ernie5.model.config import num_active_params, num_params
from ernie5.optim.schedule import learning_rate
from ernie5.train.config import RootConfig

PRETRAIN = Path(__file__).resolve().parents[2] / "configs" / "pretrain"
# Exact counts: a change here is a change of architecture and must be meant.
GOLDEN = {
    "debug": (1_392_160, 392_704),
    "quickstart": (7_460_704, 1_444_224),
    "small": (32_171_520, 5_854_464),
    "single_gpu": (513_905_408, 65_147_136),
    "ernie5_2t4": (2_451_667_091_456, 63_472_035_840),
    "ernie45_21b": (21_825_436_160, 3_352_148_480),
    "ernie45_300b": (299_484_160_000, 47_079_333_888),
}


def load(name: str) -> RootConfig:
    return load_config(PRETRAIN / f"{name}.yaml", schema=RootConfig)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_parameter_counts_of_shipped_configs_stay_what_they_are(name: str) -> None:
    model = load(name).model
    assert (num_params(model), num_active_params(model)) == GOLDEN[name]


def test_flagship_has_2_4_trillion_parameters_without_mtp_and_activates_less_than_3_percent() -> None:
    model = load("ernie5_2t4").model
    total = num_params(model, with_mtp=False)
    assert abs(total / 2.4e12 - 1) < 0.04  # the announced 2.4 T is rounded
    assert num_active_params(model) / total < 0.03


def test_published_totals_of_ernie45_come_out_to_the_printed_digit() -> None:
    assert round(num_params(load("ernie45_21b").model) / 1e9, 1) == 21.8
    assert round(num_params(load("ernie45_300b").model) / 1e9, 1) == 299.5


@pytest.mark.parametrize("path", sorted(PRETRAIN.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_survives_a_round_trip_and_tells_how_to_launch_it(path: Path) -> None:
    config = load_config(path, schema=RootConfig)
    assert config_from_dict(config_to_dict(config), schema=RootConfig) == config
    header = path.read_text(encoding="utf-8").split("base:")[0]
    assert "launch:" in header and "hardware:" in header and "time:" in header


@pytest.mark.parametrize(("stage", "tokens"), [("mid_training_32k", 32_768), ("mid_training_128k", 131_072)])
def test_the_mid_training_recipes_fit_the_flagship_and_follow_the_table(
    stage: str, tokens: int, tmp_path: Path
) -> None:
    folder, path = PRETRAIN.parent, tmp_path / "run.yaml"
    bases = f"[{folder / 'model' / 'ernie5_2t4.yaml'}, {folder / 'recipe' / f'{stage}.yaml'}]"
    path.write_text(f"base: {bases}\ntrain: {{steps: 100, run_dir: runs/mid}}\n", encoding="utf-8")
    config = load_config(path, schema=RootConfig)
    assert config.data.sequence_tokens == tokens
    assert abs(config.batch.global_sequences * tokens / 56e6 - 1) < 0.02
    assert learning_rate(0, config=config.optim, total_steps=100) == pytest.approx(1e-4, rel=1e-3)
    assert learning_rate(99, config=config.optim, total_steps=100) == pytest.approx(1e-5, rel=0.01)
    assert (config.model.moe.balance.speed, config.objectives.mtp_weight, config.model.rope_base) == (1e-5, 0.1, 1e6)


def test_every_shipped_config_has_golden_counts() -> None:
    assert {path.stem for path in PRETRAIN.glob("*.yaml")} == set(GOLDEN)


def test_describe_prints_the_flagship_as_json_without_importing_torch() -> None:
    code = (
        "import sys; from ernie5.__main__ import main; code = main(['describe', sys.argv[1], '--json']); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PRETRAIN / "ernie5_2t4.yaml")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["num_params"] == GOLDEN["ernie5_2t4"][0]
    assert printed["num_active_params"] == GOLDEN["ernie5_2t4"][1]
    assert printed["flops_per_token"] > 6 * printed["num_active_params"]
    assert printed["config"]["model"]["moe"]["num_experts"] == 384
