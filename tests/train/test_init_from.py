"""`train.init_from`: the weights of another run, and nothing else of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint.load import load_model, load_run
from ernie5.errors import CheckpointError, TokenizerError
from ernie5.train.command import main


@pytest.fixture(scope="module")
def first(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two steps."""
    run_dir = tmp_path_factory.mktemp("first") / "run"
    assert main([str(world / "run.yaml"), f"train.run_dir={run_dir}", "train.steps=2"]) == 0
    return run_dir


def start(world: Path, run_dir: Path, *, origin: Path, steps: int, settings: tuple[str, ...] = ()) -> None:
    main([str(world / "run.yaml"), f"train.run_dir={run_dir}", f"train.init_from={origin}", f"train.steps={steps}",
          "optim.schedule.warmup_steps=1", *settings])


def test_a_new_run_starts_from_the_weights_alone_and_goes_on_from_its_own_checkpoint(
    world: Path, first: Path, tmp_path: Path, read_rows: Callable
) -> None:
    origin, run_dir = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(first, origin)
    start(world, run_dir, origin=origin, steps=1, settings=("optim.learning_rate=1e-9",))
    rows = read_rows(run_dir)
    assert [row["step"] for row in rows] == [1]
    assert rows[0]["tokens"] == read_rows(first)[0]["tokens"]  # the data begin anew
    assert rows[0]["loss"] != read_rows(first)[0]["loss"]
    before, after = load_model(origin).model, load_model(run_dir).model
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.allclose(old, new, atol=1e-6), name  # one step at a rate of 1e-9
    assert load_run(run_dir).engine.updates == 1
    shutil.rmtree(origin)
    start(world, run_dir, origin=origin, steps=2)  # the run has a checkpoint: the origin is not even looked at
    log = (run_dir / "log.txt").read_text("utf-8")
    assert log.count(f"train.init_from = {origin} is not used: the run goes on from its own {run_dir}") == 1
    assert [row["step"] for row in read_rows(run_dir)] == [1, 2]


def test_what_does_not_fit_is_refused_by_name(world: Path, first: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"parameters of the checkpoint do not fit .*the model wants"):
        start(world, tmp_path / "run", origin=first, steps=1, settings=("model.dense_width=40",))
    checkpoint = Path(shutil.copytree(load_run(first).directory, tmp_path / "step-00000002"))
    values = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    values["tokenizers"]["text"] = "0" * 64
    (checkpoint / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(TokenizerError, match="other tokenizers"):
        start(world, tmp_path / "run", origin=checkpoint, steps=1)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="Import it first: ernie5 convert"):
        start(world, tmp_path / "run", origin=tmp_path / "hub", steps=1)
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    values["tokenizers"] = load_run(first).manifest.tokenizers
    (checkpoint / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its checksum"):
        start(world, tmp_path / "run", origin=checkpoint, steps=1)


def test_settings_of_the_other_weights_are_said_only_where_the_model_has_that_part(world: Path, tmp_path: Path) -> None:
    tasks = [task for name in ("image", "video", "audio") for task in (f"{name}_to_text", f"text_to_{name}")]
    settings = ("model.modalities=[text]", "data.mixture.page=0", *(f"data.mixture.{task}=0" for task in tasks))
    main([str(world / "run.yaml"), f"train.run_dir={tmp_path / 'first'}", "train.steps=1", *settings])
    start(world, tmp_path / "run", origin=tmp_path / "first", steps=1, settings=(
        *settings, "model.visual.vit_heads=4", "model.audio.codes=8", "model.rope_base=10"))
    said = [line for line in (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines() if " was " in line]
    assert len(said) == 1 and "model.rope_base was 1000000.0 when these weights were trained, is 10.0" in said[0], said


def test_weights_without_an_optimizer_are_enough(world: Path, first: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(load_run(first).directory, tmp_path / "weights"))
    values = json.loads((checkpoint / "manifest.json").read_text("utf-8"))
    for name in ("optimizer.safetensors", "state.json"):
        (checkpoint / name).unlink()
        del values["files"][name]
    values["tensors"] = {name: entry for name, entry in values["tensors"].items() if "/" not in name}
    (checkpoint / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    start(world, tmp_path / "run", origin=checkpoint, steps=1)
    with pytest.raises(CheckpointError, match=r"no optimizer state.*train.init_from="):
        load_run(checkpoint)


def test_a_replica_that_turns_out_damaged_leaves_the_weights_of_init_from(
    world: Path, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the drawn ones: the run has no checkpoint on disk yet."""
    replica = Path(shutil.copytree(load_run(first).directory, tmp_path / "memory" / "step-00000002"))
    content = bytearray((replica / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (replica / "optimizer.safetensors").write_bytes(content)
    monkeypatch.setenv("ERNIE5_REPLICA", str(replica.parent))
    start(world, tmp_path / "run", origin=first, steps=1, settings=("optim.learning_rate=1e-9",))
    assert "the replica in memory is of no use" in (tmp_path / "run" / "log.txt").read_text("utf-8")
    before, after = load_model(first).model, load_model(tmp_path / "run").model
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.allclose(old, new, atol=1e-6), name  # one step at a rate of 1e-9
