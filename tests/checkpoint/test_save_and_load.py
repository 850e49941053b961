"""Checkpoints: round trip, damage, failures while saving, retention."""

from __future__ import annotations

import errno
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint import save as save_module
from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import check_tokenizers, load_run
from ernie5.checkpoint.manifest import DTYPES_HELD, RunState, read_manifest
from ernie5.checkpoint.names import find_checkpoint, latest_checkpoint
from ernie5.checkpoint.retention import checkpoints_to_remove, clear_checkpoints
from ernie5.checkpoint.save import Contents, point_latest, save_checkpoint
from ernie5.checkpoint.tensor_file import DTYPES
from ernie5.engine.interface import EngineState
from ernie5.errors import CheckpointError, EnvironmentFault, TokenizerError


def make_state(step: int) -> EngineState:
    torch.manual_seed(step)
    parameters = {"a.weight": torch.randn(5, 3), "b.bias": torch.randn(2)}
    kinds = ("exp_avg", "exp_avg_sq")
    moments = {f"{kind}/{name}": torch.randn_like(v) for kind in kinds for name, v in parameters.items()}
    return EngineState(
        parameters=parameters, buffers={"router.balance_bias": torch.randn(4)}, moments=moments, updates=step,
        magnitudes=torch.rand(4, dtype=torch.float64) / 3,
    )


def make_contents(step: int, *, precision: str = "fp32") -> Contents:
    state = make_state(step)
    run = RunState(step=step, tokens=10 * step, data={"cursor": [step, 2]}, rng={"cpu": "00ff"}, spikes=1)
    return Contents(tuple(state.slices()), step, state.magnitudes, run, "train: {}\n", precision, {"text": "abc"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_everything_comes_back_bit_for_bit(precision: str, tmp_path: Path, read_state: Callable) -> None:
    contents, before = make_contents(7, precision=precision), make_state(7)
    path = save_checkpoint(tmp_path, contents=contents, config=CheckpointConfig())
    loaded = load_run(tmp_path)
    after = read_state(loaded.engine)
    assert loaded.directory == path and loaded.run == contents.run and loaded.engine.updates == 7
    assert torch.equal(loaded.engine.magnitudes, before.magnitudes)
    for name in ("parameters", "buffers", "moments"):
        assert vars(before)[name].keys() == vars(after)[name].keys()
        assert all(torch.equal(vars(after)[name][key], value) for key, value in vars(before)[name].items())


def test_a_checkpoint_of_version_1_is_read(tmp_path: Path, read_state: Callable) -> None:
    path = save_checkpoint(tmp_path, contents=make_contents(7), config=CheckpointConfig())
    values = json.loads((path / "manifest.json").read_text("utf-8"))
    values["version"] = 1
    for entry in values["tensors"].values():
        (part,) = entry.pop("slices")
        entry |= {"file": part["file"], "crc32": part["crc32"]}
    (path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    assert torch.equal(read_state(load_run(path).engine).parameters["a.weight"], make_state(7).parameters["a.weight"])


def test_a_flipped_byte_names_the_file_and_the_tensor(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged: (a\.weight|b\.bias|router)"):
        load_run(tmp_path)


def test_a_truncated_file_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors has \d+ bytes, the manifest says"):
        load_run(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        load_run(tmp_path)


def test_a_damaged_checkpoint_names_the_newest_other_one_that_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    config = CheckpointConfig(keep=3)
    paths = [save_checkpoint(folder, contents=make_contents(step), config=config) for step in (1, 2, 3)]
    for path in paths[1:]:
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"whole is {paths[0]}\. .*ernie5 train CONFIG --resume {paths[0]}$"):
        load_run(folder)
    (tmp_path / "config.yaml").write_text("", encoding="utf-8")
    (paths[2] / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"train {tmp_path}/config\.yaml --resume {paths[0]}$"):
        load_run(folder)
    (paths[0] / "state.json").unlink()
    with pytest.raises(CheckpointError, match=f"No other checkpoint of {folder} is whole"):
        load_run(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "other"}', '{"format": "ernie5-checkpoint", "version": 1}']
)
def test_a_damaged_manifest_is_one_clear_error(text: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [(("tokenizers", "text"), None), (("files", "state.json", "num_bytes"), {"a": 1}), (("step",), float("inf")),
     (("files", "state.json", "sha256"), {}), (("tensors", "a.weight", "dtype"), "F17"),
     (("tensors", "a.weight", "dtype"), 0)],
)
def test_a_manifest_with_values_of_other_kinds_is_damaged(place: tuple, value: object, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())
    values = json.loads((path / "manifest.json").read_text())
    functools.reduce(dict.__getitem__, place[:-1], values)[place[-1]] = value
    (path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(path)


def test_the_manifest_names_the_dtypes_that_files_hold() -> None:
    assert DTYPES_HELD == tuple(DTYPES)


def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(save_module, "sync_file", full)
    with pytest.raises(EnvironmentFault, match=r"previous checkpoint stands: .*step-00000001"):
        save_checkpoint(tmp_path, contents=make_contents(2), config=CheckpointConfig())
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert load_run(tmp_path).run.step == 1


def test_a_kill_between_rename_and_latest_still_resumes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())
    newest = save_checkpoint(tmp_path, contents=make_contents(2), config=CheckpointConfig())
    (tmp_path / "latest").write_text("step-00000009\n")
    (tmp_path / ".tmp-step-00000003-1").mkdir()
    assert find_checkpoint(tmp_path) == newest
    save_checkpoint(tmp_path, contents=make_contents(3), config=CheckpointConfig())
    assert not list(tmp_path.glob(".tmp-*"))


def test_saving_the_same_step_twice_replaces_it(tmp_path: Path) -> None:
    for _ in range(2):
        save_checkpoint(tmp_path, contents=make_contents(4), config=CheckpointConfig())
    assert load_run(tmp_path).run.step == 4


def test_a_kill_in_the_middle_of_replacing_a_step_loses_no_complete_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, contents=make_contents(4), config=CheckpointConfig())
    path.rename(tmp_path / f".tmp-replaced-{path.name}")
    (tmp_path / ".tmp-step-00000004-1").mkdir()
    save_checkpoint(tmp_path, contents=make_contents(5), config=CheckpointConfig())
    assert load_run(path).run.step == 4 and not list(tmp_path.glob(".tmp-*"))


def test_latest_can_name_a_checkpoint_of_the_folder_and_of_another_one(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path / "run", contents=make_contents(1), config=CheckpointConfig())
    save_checkpoint(tmp_path / "run", contents=make_contents(2), config=CheckpointConfig())
    other = save_checkpoint(tmp_path / "other", contents=make_contents(7), config=CheckpointConfig())
    for target in (first, other):
        point_latest(tmp_path / "run", target=target)
        assert find_checkpoint(tmp_path / "run") == target
    assert (tmp_path / "other" / "latest").read_text() == "step-00000007\n"


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00\x80", b"step-00000001\x00", b"x" * 5000, b""])
def test_a_damaged_latest_counts_as_gone(damage: bytes, tmp_path: Path, verb: Callable) -> None:
    paths = [save_checkpoint(tmp_path, contents=make_contents(step), config=CheckpointConfig()) for step in (1, 2)]
    (tmp_path / "latest").write_bytes(damage)
    assert latest_checkpoint(tmp_path) == paths[1]
    for name in ("verify", "inspect"):
        code, out, _ = verb(name, tmp_path)
        assert code == 0 and str(paths[1]) in out


def test_retention_keeps_the_newest_and_the_milestones() -> None:
    steps = [10, 20, 30, 40, 50]
    assert checkpoints_to_remove(steps, newest=50, config=CheckpointConfig(keep=2)) == [10, 20, 30]
    assert checkpoints_to_remove(steps, newest=50, config=CheckpointConfig(keep=1, keep_every_steps=20)) == [10, 30]
    assert checkpoints_to_remove(steps, newest=30, config=CheckpointConfig(keep=1)) == [10, 20]


def test_going_back_to_an_earlier_checkpoint_keeps_what_is_saved_from_there(tmp_path: Path) -> None:
    for step in (10, 20, 30, 15):
        newest = save_checkpoint(tmp_path, contents=make_contents(step), config=CheckpointConfig(keep=2))
    assert newest.name == "step-00000015" and latest_checkpoint(tmp_path) == newest
    assert load_run(tmp_path).run.step == 15


def test_clearing_leaves_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save_checkpoint(folder, contents=make_contents(1), config=CheckpointConfig())
    (folder / "thesis.txt").write_text("mine", encoding="utf-8")
    clear_checkpoints(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    clear_checkpoints(folder)
    assert not folder.exists()


def test_another_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())
    manifest = load_run(tmp_path).manifest
    check_tokenizers(manifest, identities={"text": "abc"})
    with pytest.raises(TokenizerError, match="text"):
        check_tokenizers(manifest, identities={"text": "xyz"})


def test_a_directory_without_a_checkpoint_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="absent does not exist"):
        find_checkpoint(tmp_path / "absent")


def test_the_manifest_is_plain_json_with_shapes_and_checksums(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, contents=make_contents(1), config=CheckpointConfig())
    values = json.loads((path / "manifest.json").read_text())
    assert values["tensors"]["a.weight"]["shape"] == [5, 3]
    assert len(values["files"]["model.safetensors"]["sha256"]) == 64
