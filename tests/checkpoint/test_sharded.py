"""Checkpoints that every rank writes its part of: any layout reads any other, and nothing half ever counts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_run
from ernie5.checkpoint.manifest import read_manifest
from ernie5.checkpoint.parts import activity
from ernie5.checkpoint.reshard import LayoutPlan, reshard
from ernie5.checkpoint.save import plan_part, prepare, publish, write_part
from ernie5.errors import CheckpointError
from ernie5.parallel.dims import GridDims
from ernie5.parallel.stages import plan_stages


def load_file(name: str, path: Path) -> object:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


JOB = load_file("rank_job", Path(__file__).with_name("rank_job.py"))
run_ranks_once = load_file("ranks", Path(__file__).parent.parent / "parallel" / "conftest.py").run_ranks_once
LAYOUTS = {
    2: {"dp2": {}, "tp2-ep2": {"tp": 2, "ep": 2}, "pp2": {"pp": 2}},
    4: {"tp2-cp2-ep2-etp2": {"tp": 2, "cp": 2, "ep": 2, "etp": 2}},
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]
# fp32 sums in another order, through one AdamW step
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process after one step."""
    engine = JOB.make_engine(None)
    JOB.train(engine, seed=1)
    return JOB.save(engine, folder=tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def reloaded(start: Path, run_ranks_once: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """What every rank of each layout saw, by name of the layout."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {}
    for ranks, layouts in LAYOUTS.items():
        found = run_ranks_once(JOB.reload_everywhere, ranks, str(start), str(folder), layouts, "fp32")
        assert all(isinstance(one, dict) for one in found), found
        results |= {name: [one[name] for one in found] for name in layouts}
    return results


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_went_through_a_layout_comes_back_byte_for_byte(
    name: str, reloaded: dict, start: Path, tmp_path: Path
) -> None:
    engine = JOB.make_engine(None, seed=8)
    engine.load_state(load_run(reloaded[name][0]["path"]).engine)
    back = JOB.save(engine, folder=tmp_path)
    assert sorted(path.name for path in back.iterdir()) == sorted(path.name for path in start.iterdir())
    for path in start.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_writes_its_own_file_and_nobody_the_same(name: str, reloaded: dict) -> None:
    path = Path(reloaded[name][0]["path"])
    manifest = read_manifest(path)
    ranks = len(reloaded[name])
    written = {part.file for entry in manifest.tensors.values() for part in entry.slices}
    assert written == {f"{kind}-{rank:05d}.safetensors" for kind in ("model", "optimizer") for rank in range(ranks)}
    assert {"manifest.json", "state.json", "config.yaml", *written} == {file.name for file in path.iterdir()}
    sizes = [manifest.files[f"optimizer-{rank:05d}.safetensors"].num_bytes for rank in range(ranks)]
    assert max(sizes) < 1.35 * sum(sizes) / ranks  # the embedding and the experts are what cannot be shared more evenly


@pytest.mark.parametrize("name", NAMES)
def test_the_same_layout_goes_on_bit_for_bit_and_another_one_within_rounding(
    name: str, reloaded: dict, start: Path
) -> None:
    assert all(one["same"] and one["once"] == one["twice"] for one in reloaded[name])
    path = Path(reloaded[name][0]["path"])
    again = path.parent.parent / f"{name}-again" / path.name
    assert all((again / file.name).read_bytes() == file.read_bytes() for file in path.iterdir())
    engine = JOB.make_engine(None, seed=8)
    engine.load_state(load_run(start).engine)
    losses, norm = JOB.train(engine, seed=9)
    assert reloaded[name][0]["once"][0] == pytest.approx(losses, rel=TOLERANCE)
    assert reloaded[name][0]["once"][1] == pytest.approx(norm, rel=TOLERANCE)


def test_bf16_masters_go_through_a_layout_too(run_ranks_once: Callable, tmp_path: Path) -> None:
    engine = JOB.make_engine(None, precision="bf16")
    JOB.train(engine, seed=1)
    start = JOB.save(engine, folder=tmp_path / "start", precision="bf16")
    layouts = {"tp2": {"tp": 2}}
    found = run_ranks_once(JOB.reload_everywhere, 2, str(start), str(tmp_path), layouts, "bf16")
    assert all(one["tp2"]["same"] for one in found), found
    other = JOB.make_engine(None, seed=8, precision="bf16")
    other.load_state(load_run(found[0]["tp2"]["path"]).engine)
    back = JOB.save(other, folder=tmp_path / "back", precision="bf16")
    for path in start.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("phase", ["behind", "waiting"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_is_full_for_one_rank_leaves_the_previous_checkpoint(
    failing: int, phase: str, run_ranks_once: Callable, tmp_path: Path
) -> None:
    results = run_ranks_once(JOB.fail_on_one_rank, 2, str(tmp_path), failing, phase)
    messages = [message for message, _ in results]
    assert "the disk is full" in messages[failing] and "previous checkpoint stands" in messages[failing], results
    assert "saving failed on another rank" in messages[1 - failing]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert load_run(tmp_path).run.step == 1


def test_a_file_that_is_renamed_while_a_folder_is_read_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / ".part-00001.new").symlink_to(tmp_path / "gone")  # listed, but not there when it is asked for its size
    before = activity(tmp_path)
    assert before[0] == 3 and before == activity(tmp_path)
    os.utime(tmp_path / "model.safetensors")  # as a rank does that reads its file back
    assert activity(tmp_path) != before


def test_what_no_rank_wrote_never_becomes_a_checkpoint(run_ranks_once: Callable, tmp_path: Path) -> None:
    cut, whole = run_ranks_once(JOB.forget_a_slice, 2, str(tmp_path))[0]
    assert "which do not make up its shape" in cut and "no rank wrote" in whole
    assert not list(tmp_path.iterdir())


def test_a_wrong_shape_is_refused_on_every_rank(start: Path, run_ranks_once: Callable) -> None:
    for (message,) in run_ranks_once(JOB.wrong_model, 2, str(start)):
        assert "final_norm.weight has shape [31], the model wants [32]" in message


@pytest.mark.parametrize("name", ["dp2", "tp2-ep2", "pp2"])
def test_reshard_writes_what_the_layout_itself_writes(name: str, reloaded: dict, start: Path, tmp_path: Path) -> None:
    dims = GridDims(**{"dp2": {"dp": 2}, "tp2-ep2": {"tp": 2, "ep": 2}, "pp2": {"pp": 2}}[name])
    plan = LayoutPlan(dims, plan_stages(JOB.MODEL, pp=dims.pp))
    reshard(start, target=tmp_path / "there", ranks=2, plan=plan)
    expected = Path(reloaded[name][0]["path"])
    assert sorted(path.name for path in expected.iterdir()) == sorted(p.name for p in (tmp_path / "there").iterdir())
    assert all((tmp_path / "there" / path.name).read_bytes() == path.read_bytes() for path in expected.iterdir())


def copied(reloaded: dict, *, to: Path) -> Path:
    return Path(shutil.copytree(reloaded["tp2-ep2"][0]["path"], to / "step-00000001"))


def test_a_rank_whose_file_is_missing_or_cut_off_is_named(reloaded: dict, tmp_path: Path) -> None:
    path = copied(reloaded, to=tmp_path)
    file = path / "optimizer-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer-00001\.safetensors has \d+ bytes, .* \(damaged: "):
        load_run(path)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"optimizer-00001\.safetensors does not match .* \(damaged: exp_"):
        load_run(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"optimizer-00001\.safetensors is missing"):
        load_run(path)


def test_a_manifest_whose_slices_do_not_fit_is_refused(reloaded: dict, tmp_path: Path) -> None:
    path = copied(reloaded, to=tmp_path)
    values = json.loads((path / "manifest.json").read_text("utf-8"))
    name = next(name for name, entry in values["tensors"].items() if len(entry["slices"]) > 1)
    kept = values["tensors"][name]["slices"]

    def read_with(slices: list[dict]) -> None:
        values["tensors"][name]["slices"] = slices
        (path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
        load_run(path)

    first, second = kept[0], kept[1]
    moved = [start + 1 for start in second["start"]]
    for slices in ([first], [first, first], [first, {**second, "start": moved}], [first, {**second, "start": [0]}]):
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            read_with(slices)
    read_with(kept)


def test_files_of_two_checkpoints_are_not_mixed(reloaded: dict, tmp_path: Path) -> None:
    """A manifest that names a slice of another shape than the file has, with checksums that fit the file."""
    path = copied(reloaded, to=tmp_path)
    values = json.loads((path / "manifest.json").read_text("utf-8"))
    name = next(n for n, e in values["tensors"].items() if len(e["slices"]) == 2 and e["shape"][0] % 2 == 0)
    one, two = values["tensors"][name]["slices"]
    one["file"], two["file"] = two["file"], one["file"]
    (path / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    loaded = load_run(path)
    engine = JOB.make_engine(None, seed=8)
    with pytest.raises(CheckpointError, match="the file does not hold it: files of different checkpoints were mixed"):
        engine.load_state(loaded.engine)


def test_a_rank_that_writes_no_record_voids_the_save(tmp_path: Path) -> None:
    contents = dataclasses.replace(JOB.contents_of(JOB.make_engine(None), step=1), ranks=2)
    temporary = tmp_path / ".tmp-step-00000001-x"
    prepare(temporary)
    write_part(temporary, plan=plan_part(contents))
    with pytest.raises(CheckpointError, match="rank 1 of 2 has written nothing"):
        publish(temporary, contents=contents, config=CheckpointConfig())
    assert not (tmp_path / "latest").exists()
