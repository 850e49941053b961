"""`checkpoint.format: deepspeed`: DeepSpeed's own files where they are exact, a refusal where they lose something."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.retention import clear_checkpoints
from ernie5.config.load import load_config
from ernie5.errors import ConfigError
from ernie5.train.config import RootConfig
from ernie5.train.saving import save_native


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


class WritingEngine:
    """The part of an engine that `save_native` asks: where it writes, and which rank this is. It has taken fewer
    updates than the run has taken steps, as after skipped ones."""

    is_main, updates = True, 3

    def save_native(self, folder: Path, *, name: str) -> None:
        (folder / name).mkdir(parents=True)
        (folder / name / "states.pt").touch()
        for left in ("latest", "zero_to_fp32.py", "zero_to_torch.py"):
            (folder / left).write_text(name, encoding="utf-8")


def test_what_was_just_written_stays_where_later_steps_lie_and_fresh_clears_all(tmp_path: Path) -> None:
    folder, engine = tmp_path / "deepspeed", WritingEngine()
    config = CheckpointConfig(keep=1, keep_every_steps=20)
    for step in (20, 30, 40, 15, 16):  # after 40 the run went back
        save_native(folder, engine=engine, step=step, config=config)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000016", "step-00000020", "step-00000040"]
    clear_checkpoints(tmp_path)
    assert not folder.exists()
