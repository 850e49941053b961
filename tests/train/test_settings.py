"""Settings that would be ignored are refused, and a name without a path is answered with the file that it may mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ernie5.config.load import load_config
from ernie5.errors import ConfigError, EnvironmentFault
from ernie5.train.build import choose_device
from ernie5.train.config import RootConfig


@pytest.fixture
def debug(repository: Path) -> Path:
    """The smallest configuration."""
    return repository / "configs" / "pretrain" / "debug.yaml"


@pytest.mark.parametrize("kind", ["local", "grid"])
def test_zero_stages_are_refused_where_the_engine_has_none(debug: Path, kind: str) -> None:
    for stage in (0, 1):  # 1 is the default, which a resolved config.yaml writes down for every engine
        load_config(debug, schema=RootConfig, overrides=(f"engine.kind={kind}", f"engine.zero_stage={stage}"))
    with pytest.raises(ConfigError, match=f"engine.zero_stage = 2: the {kind} engine .* would ignore it"):
        load_config(debug, schema=RootConfig, overrides=(f"engine.kind={kind}", "engine.zero_stage=2"))


def test_chunks_shorter_than_the_look_ahead_are_refused_with_the_configuration(debug: Path) -> None:
    changes = ["engine.kind=grid", "parallel.cp=2", "parallel.context_chunk=1", "data.sequence_tokens=32"]
    load_config(debug, schema=RootConfig, overrides=(*changes, "model.mtp.depth=1"))
    with pytest.raises(ConfigError, match=r"^parallel.context_chunk = 1: .*Set parallel.context_chunk: 2"):
        load_config(debug, schema=RootConfig, overrides=(*changes, "model.mtp.depth=2"))


def test_what_deepspeed_would_train_otherwise_is_refused_with_the_configuration(debug: Path) -> None:
    """Not when ranks build their engines: one of them ends first, and the others speak of a lost peer."""
    half = ("engine.kind=deepspeed", "engine.precision=bf16")
    with pytest.raises(ConfigError, match=r"^engine.recompute = 'full': stage 0 runs .*Set engine.zero_stage: 1"):
        load_config(debug, schema=RootConfig, overrides=(*half, "engine.zero_stage=0", "engine.recompute=full"))
    on_host = (*half, "engine.zero_stage=1", "engine.offload_optimizer=cpu")
    config = load_config(debug, schema=RootConfig, overrides=(*on_host, "batch.micro_sequences=1", "data.streams=4"))
    assert config.derive_dp(4) == 4
    with pytest.raises(ConfigError, match=r"^engine.offload_optimizer = 'cpu': .* 2 micro-batches"):
        config.derive_dp(2)


def test_deepep_is_refused_with_rows_that_it_does_not_carry(debug: Path) -> None:
    changes = ("engine.kind=grid", "parallel.ep=2", "parallel.dispatcher=deepep")
    load_config(debug, schema=RootConfig, overrides=(*changes, "engine.precision=bf16"))
    with pytest.raises(ConfigError, match=r"^parallel.dispatcher = 'deepep': .* Set engine.precision: bf16"):
        load_config(debug, schema=RootConfig, overrides=(*changes, "engine.precision=fp32"))


def test_a_name_without_a_path_is_answered_with_the_whole_configurations_of_that_name(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config("debug", schema=RootConfig)
    assert f"Did you mean {repository}/configs/pretrain/debug.yaml?" in str(caught.value)
    assert "configs/model/debug.yaml" not in str(caught.value)
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError, match="Did you mean configs/pretrain/debug.yaml?"):
        load_config("debug.yaml", schema=RootConfig)
    with pytest.raises(ConfigError) as caught:
        load_config("no_such_name", schema=RootConfig)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(("local_rank", "gpus"), [("1", 1), ("8", 8)])
def test_more_processes_than_gpus_are_refused_by_number(
    monkeypatch: pytest.MonkeyPatch, local_rank: str, gpus: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(EnvironmentFault, match=rf"process {local_rank} of its host.* sees {gpus} GPU"):
        choose_device("auto")
    assert choose_device("cpu") == torch.device("cpu")
