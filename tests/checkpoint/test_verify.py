"""`ernie5 verify` names what is damaged; `ernie5 evaluate --logits` refuses what are no ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.manifest import RunState
from ernie5.checkpoint.save import Contents, save_checkpoint
from ernie5.engine.interface import EngineState
from ernie5.errors import DataError
from ernie5.evaluate.logits import read_ids


def save(folder: Path, *, step: int) -> Path:
    parameters = {"a.weight": torch.randn(50, 3), "b.weight": torch.randn(20), "c.weight": torch.randn(7)}
    moments = {f"exp_avg/{name}": value for name, value in parameters.items()}
    engine = EngineState(parameters, {}, moments, step, torch.ones(4, dtype=torch.float64))
    run = RunState(step=step, tokens=step, data={}, rng={})
    contents = Contents(tuple(engine.slices()), step, engine.magnitudes, run, "train: {}\n", "fp32", {})
    return save_checkpoint(folder, contents=contents, config=CheckpointConfig(keep=5))


def flip(path: Path, *, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def test_a_run_is_verified_checkpoint_by_checkpoint_and_the_good_one_is_named(verb: Callable, tmp_path: Path) -> None:
    paths = [save(tmp_path / "checkpoints", step=step) for step in (1, 2)]
    code, out, _ = verb("verify", tmp_path)
    assert code == 0 and all(f"{path}: whole" in out for path in paths)
    code, out, _ = verb("verify", tmp_path, "--latest")
    assert code == 0 and f"{paths[1]}: whole" in out and str(paths[0]) not in out
    flip(paths[1] / "model.safetensors", at=-1)
    code, out, err = verb("verify", tmp_path)
    assert code == 2 and f"{paths[0]}: whole" in out and str(paths[1]) in err
    assert f"The newest that is whole is {paths[0]}" in err
    assert verb("verify", paths[0])[0] == 0 and verb("verify", paths[1])[0] == 2
    (paths[1] / "manifest.json").unlink()
    code, _, err = verb("verify", tmp_path)
    assert code == 2 and f"{paths[1]} has no manifest.json" in err and f"whole is {paths[0]}" in err
    flip(paths[0] / "optimizer.safetensors", at=-1)
    code, out, err = verb("verify", tmp_path)
    assert code == 2 and "None is whole" in err and not out


def test_the_newest_whole_one_counts_wherever_latest_points(verb: Callable, tmp_path: Path) -> None:
    """A resumed run's `latest` may name a checkpoint of another run until it has saved one of its own."""
    old = save(tmp_path / "other", step=1)
    paths = [save(tmp_path / "run" / "checkpoints", step=step) for step in (2, 3)]
    (tmp_path / "run" / "checkpoints" / "latest").write_text(f"{old}\n", encoding="utf-8")
    flip(paths[1] / "model.safetensors", at=-1)
    code, out, err = verb("verify", tmp_path / "run")
    assert code == 2 and f"{old}: whole" in out and f"The newest that is whole is {paths[0]}" in err


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", lambda path: flip(path, at=-1), "does not match its checksum (damaged: c.weight)"),
        ("optimizer.safetensors", lambda path: flip(path, at=-1), "(damaged: exp_avg/c.weight)"),
        ("model.safetensors", lambda path: flip(path, at=9), "does not match its checksum"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-40]),
         "it is cut off or was replaced (damaged: b.weight, c.weight)"),
        ("model.safetensors", lambda path: path.write_bytes(b""), "its header is gone"),
        ("model.safetensors", lambda path: path.unlink(), "model.safetensors is missing"),
        ("state.json", lambda path: flip(path, at=3), "state.json does not match its checksum"),
        ("manifest.json", lambda path: path.write_text("{"), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_by_file_and_tensor_in_one_line(
    file: str, damage: Callable, message: str, verb: Callable, tmp_path: Path
) -> None:
    path = save(tmp_path, step=1)
    damage(path / file)
    code, out, err = verb("verify", path)
    assert code == 2 and not out and err.count("\n") == 1 and str(path / file) in err and message in err, err


def test_all_damage_of_a_checkpoint_is_listed_at_once(verb: Callable, tmp_path: Path) -> None:
    path = save(tmp_path, step=1)
    flip(path / "model.safetensors", at=-1)
    (path / "state.json").unlink()
    _, _, err = verb("verify", path)
    assert "c.weight" in err and "state.json is missing" in err


def drop_tensor(values: dict) -> None:
    del values["tensors"]["exp_avg/b.weight"]


def drop_optimizer(values: dict) -> None:
    del values["files"]["optimizer.safetensors"]
    values["tensors"] = {name: entry for name, entry in values["tensors"].items() if "/" not in name}


def add_tensor(values: dict) -> None:
    values["tensors"]["d.weight"] = values["tensors"]["a.weight"]


def reshape_tensor(values: dict) -> None:
    entry = values["tensors"]["a.weight"]
    entry["shape"] = entry["slices"][0]["shape"] = [3, 50]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values.update(step=7), "step is 7 there and 1 in state.json"),
        (lambda values: values.update(tokens=7), "tokens is 7 there and 1 in state.json"),
        (lambda values: values.update(precision="bf16"), "precision is bf16 there, and the tensors are those of fp32"),
        (lambda values: values["tensors"]["a.weight"].update(dtype="BF16"), "a.weight of shape [50, 3] BF16, and"),
        (lambda values: values["tensors"]["a.weight"].update(num_bytes=1), "has 1 bytes"),
        (reshape_tensor, "a.weight of shape [3, 50] F32, and the file holds [50, 3] F32"),
        (drop_tensor, "optimizer.safetensors holds exp_avg/b.weight, which the manifest does not know"),
        (add_tensor, "holds d.weight of shape [50, 3] F32, and the file does not"),
        (drop_optimizer, "optimizer.safetensors holds tensors and is not in the manifest"),
        (lambda values: values["files"].pop("config.yaml"), "needs config.yaml, and its manifest does not list it"),
        (lambda values: values["files"].pop("state.json"), "needs state.json, and its manifest does not list it"),
    ],
)
def test_a_manifest_that_was_edited_is_not_whole(
    edit: Callable, message: str, verb: Callable, tmp_path: Path
) -> None:
    path = save(tmp_path, step=1)
    values = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    edit(values)
    for name in {"config.yaml", "state.json"} - set(values["files"]):
        (path / name).unlink()
    (path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    code, out, err = verb("verify", path)
    assert code == 2 and not out and message in err and err.count("\n") == 1, err


def test_all_and_the_latest_alone_exclude_each_other(verb: Callable, tmp_path: Path) -> None:
    save(tmp_path, step=1)
    code, _, err = verb("verify", tmp_path, "--all", "--latest")
    assert code == 2 and "not allowed with argument" in err


def test_ids_that_are_none_are_refused_with_the_rule(verb: Callable, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    for name, value in (
        ("list", [1, 2]), ("floats", torch.zeros(2, 3)), ("flat", torch.zeros(3, dtype=torch.int64)),
        ("none", torch.zeros(0, 4, dtype=torch.int64)), ("int32", torch.zeros(2, 2, dtype=torch.int32)),
        ("evil", Evil()),
    ):
        torch.save(value, tmp_path / name)
        with pytest.raises(DataError, match=r"LongTensor \[B, T\]"):
            read_ids(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "text").write_text("12 13")
    for name in ("text", "absent"):
        with pytest.raises(DataError, match=name):
            read_ids(tmp_path / name)
    path = save(tmp_path / "checkpoints", step=1)
    code, _, err = verb("evaluate", path, "--logits", tmp_path / "list")
    assert code == 2 and "goes with --out" in err
