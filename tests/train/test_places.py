"""A run whose checkpoints lie elsewhere, given relative to where training started, is found from any directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from ernie5.checkpoint.command import main as inspect
from ernie5.checkpoint.names import find_checkpoint
from ernie5.checkpoint.places import folder_of_run
from ernie5.checkpoint.verify import main as verify
from ernie5.generate.load import load_generation
from ernie5.train.command import main as train


@pytest.fixture
def homes(tmp_path: Path) -> tuple[Path, Path]:
    """Where training starts, and another directory."""
    made = tmp_path / "home", tmp_path / "away"
    for home in made:
        home.mkdir()
    return made


def start(world: Path, *changes: str) -> None:
    train([str(world / "run.yaml"), "checkpoint.dir=far/mine", "train.eval_every_steps=0", *changes])


def as_written_before(config: Path, *, run_dir: str) -> None:
    """Make a config.yaml name its places as they were given, which is what earlier versions wrote."""
    values = yaml.safe_load(config.read_text("utf-8"))
    values["train"]["run_dir"], values["checkpoint"]["dir"] = run_dir, "far/mine"
    config.write_text(yaml.safe_dump(values, sort_keys=False), "utf-8")


def use(run_dir: Path, *, expected: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for verb in (inspect, verify):
        assert verb([str(run_dir)]) == 0 and str(expected) in capsys.readouterr().out
    assert find_checkpoint(run_dir).resolve() == expected
    assert load_generation(run_dir).step == int(expected.name.removeprefix("step-"))


def test_a_relative_folder_is_found_from_another_directory_and_gone_on_with(
    world: Path, homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the tokenizers that the run keeps, which are beside its directory and not beside its checkpoints."""
    home, away = homes
    monkeypatch.chdir(home)
    shutil.copytree(world / "text", home / "text")
    start(world, "train.run_dir=runs/one", "train.steps=1", "tokenizers.text=text")
    shutil.rmtree(home / "text")
    monkeypatch.chdir(away)
    use(home / "runs" / "one", expected=home / "far" / "mine" / "step-00000001", capsys=capsys)
    start(world, f"train.run_dir={home / 'runs' / 'one'}", "train.steps=2")
    assert "resumed from" in (home / "runs" / "one" / "log.txt").read_text("utf-8")
    use(home / "runs" / "one", expected=home / "far" / "mine" / "step-00000002", capsys=capsys)
    train([str(home / "runs" / "one" / "config.yaml"), "train.steps=3"])  # which names nothing relative any more
    assert (home / "far" / "mine" / "step-00000003").is_dir() and not any(away.iterdir())
    start(world, f"train.run_dir={home / 'runs' / 'one'}", "train.steps=1", "--fresh")  # the folder that is named here
    assert (away / "far" / "mine" / "step-00000001").is_dir()


def test_a_runs_own_config_means_that_run_from_any_directory_and_after_it_moved(
    world: Path, homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, away = homes
    monkeypatch.chdir(home)
    train([str(world / "run.yaml"), "train.eval_every_steps=0", "train.run_dir=runs/one", "train.steps=1"])
    monkeypatch.chdir(away)
    train([str(home / "runs" / "one" / "config.yaml"), "train.steps=2"])
    assert not any(away.iterdir()) and find_checkpoint(home / "runs" / "one").name == "step-00000002"
    shutil.move(home / "runs" / "one", home / "moved")
    train([str(home / "moved" / "config.yaml"), "train.steps=3"])
    assert not any(away.iterdir()) and find_checkpoint(home / "moved").name == "step-00000003"
    assert not (home / "runs" / "one").exists()
    train([str(home / "moved" / "config.yaml"), "train.run_dir=other", "train.steps=1"])  # another run, named
    assert find_checkpoint(away / "other").name == "step-00000001"


@pytest.mark.parametrize("run_dir", ["runs/one", "{home}/runs/one"])
def test_runs_that_wrote_it_relative_are_found_and_never_taken_for_another(
    run_dir: str, world: Path, homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, away = homes
    run = home / "runs" / "one"
    monkeypatch.chdir(home)
    start(world, f"train.run_dir={run}", "train.steps=1")
    checkpoint, written = home / "far" / "mine" / "step-00000001", run_dir.format(home=home)
    manifest = checkpoint / "manifest.json"
    shutil.copytree(home / "far", away / "far")  # of another run, in the very place where a relative path leads
    as_written_before(away / "far" / "mine" / checkpoint.name / "config.yaml", run_dir="runs/other")
    for config in (run / "config.yaml", checkpoint / "config.yaml"):
        as_written_before(config, run_dir=written)
    monkeypatch.chdir(away)
    assert inspect([str(run)]) == 0 and str(checkpoint) in capsys.readouterr().out
    assert folder_of_run(run, setting="far/mine") == checkpoint.parent
    assert folder_of_run(run, setting="far/other") == away / "far" / "other"
    assert folder_of_run(run, setting=None) == run / "checkpoints" and manifest.is_file()


def test_a_run_directory_that_moved_away_from_its_checkpoints_still_knows_them(
    world: Path, homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, away = homes
    monkeypatch.chdir(home)
    start(world, "train.run_dir=runs/one", "train.steps=1")
    shutil.move(home / "runs" / "one", away / "moved")
    assert inspect([str(away / "moved")]) == 0
    assert str(home / "far" / "mine" / "step-00000001") in capsys.readouterr().out


def test_a_run_in_the_home_folder_makes_no_folder_named_tilde(
    world: Path, homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, away = homes
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(away)
    changes = ("train.run_dir=~/mine", "checkpoint.dir=~/far", "train.steps=1", "train.eval_every_steps=0")
    train([str(world / "run.yaml"), *changes])
    assert sorted(path.name for path in home.iterdir()) == ["far", "mine"] and not list(away.iterdir())
    written = yaml.safe_load((home / "mine" / "config.yaml").read_text("utf-8"))
    assert written["train"]["run_dir"] == str(home / "mine") and written["checkpoint"]["dir"] == str(home / "far")
