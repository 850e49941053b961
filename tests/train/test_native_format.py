"""`checkpoint.format: deepspeed`: DeepSpeed's own files where they are exact, a refusal where they lose something."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie5.config.load import load_config
from ernie5.errors import ConfigError
from ernie5.train.config import RootConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["engine.kind=local"], "the local engine has no such files"),
        (["engine.kind=deepspeed", "parallel.ep=2"], "saves the experts of one rank and loses all others"),
        (["engine.kind=deepspeed", "parallel.pp=2"], "with pp = 2 every stage writes files of its own weights"),
        (["engine.kind=deepspeed", "parallel.tp=2", "model.kv_heads=2"], "joins every weight of the tensor ranks"),
        (["engine.kind=deepspeed", "engine.zero_stage=2"], "in stage 2 DeepSpeed sees weights without their names"),
        (["engine.kind=deepspeed", "engine.zero_stage=3"], "one step counter"),
    ],
)
def test_what_loses_something_is_refused_with_the_reason(settings: list[str], message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(world / "run.yaml", schema=RootConfig, overrides=[*settings, "checkpoint.format=deepspeed"])
