"""`checkpoint.format: deepspeed`: DeepSpeed's own files where they are exact, a refusal where they lose something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint.load import load_run
from ernie5.config.load import load_config
from ernie5.errors import ConfigError
from ernie5.parallel.boxes import whole_box
from ernie5.train.config import RootConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["engine.kind=local"], "the local engine has no such files"),
        (["engine.kind=deepspeed", "parallel.ep=2"], "saves the experts of one rank and loses all others"),
        (["engine.kind=deepspeed", "engine.zero_stage=2"], "in stage 2 DeepSpeed sees weights without their names"),
        (["engine.kind=deepspeed", "engine.zero_stage=3"], "one step counter"),
    ],
)
def test_what_loses_something_is_refused_with_the_reason(settings: list[str], message: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(world / "run.yaml", schema=RootConfig, overrides=[*settings, "checkpoint.format=deepspeed"])


@pytest.mark.slow
def test_zero_to_fp32_gives_the_masters_of_our_checkpoint(world: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it: DeepSpeed's script reads pickles, which ernie5 never does."""
    run_dir = tmp_path / "run"
    settings = ["engine.kind=deepspeed", "engine.zero_stage=1", "engine.precision=bf16", "checkpoint.keep=1",
                "checkpoint.every_steps=1", "train.steps=2", "checkpoint.format=deepspeed", f"train.run_dir={run_dir}"]
    command = [sys.executable, "-m", "ernie5", "train", str(world / "run.yaml"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "WORLD_SIZE": "1"})
    assert done.returncode == 0, done.stderr
    native = run_dir / "checkpoints" / "deepspeed"
    assert [path.name for path in native.glob("step-*")] == ["step-00000002"] and (native / "zero_to_fp32.py").is_file()
    subprocess.run([sys.executable, str(native / "zero_to_fp32.py"), str(native), str(tmp_path / "out")], check=True,
                   capture_output=True, timeout=900)
    theirs = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    state = load_run(run_dir).engine
    for name, shape in state.shapes("parameters").items():
        ours = torch.empty(shape)
        state.read(name, box=whole_box(shape), into=ours)
        assert torch.equal(next(value for key, value in theirs.items() if key.endswith(name)), ours), name
