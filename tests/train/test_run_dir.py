"""The run directory: who holds it, what --fresh takes from it and when, and where its checkpoints may lie."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ernie5.errors import ConfigError, DataError, EnvironmentFault, Ernie5Error, TokenizerError
from ernie5.train import run_dir as module
from ernie5.train.command import main
from ernie5.train.run_dir import LOCK_FILE, held

PATIENCE_SECONDS = 240


def files_of(folder: Path) -> dict[str, bytes]:
    """Content by path, without what tells of the start itself."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("log.txt", "exit.json")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("settings, error", [
    (("tokenizers.text=/nowhere",), TokenizerError),
    (("data.shards=[/nowhere/*.tar]",), DataError),
    (("observe.wandb=true",), EnvironmentFault),
    (("checkpoint.dir=/proc/none",), EnvironmentFault),
], ids=lambda value: "")
def test_fresh_takes_the_old_run_only_when_the_new_one_can_begin(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], error: type[Ernie5Error]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run_dir = tmp_path / "run"
    command = [str(world / "run.yaml"), f"train.run_dir={run_dir}", "train.eval_every_steps=0"]
    main([*command, "train.steps=2"])
    before = files_of(run_dir)
    with pytest.raises(error):
        main([*command, "--fresh", "train.steps=1", *settings])
    assert files_of(run_dir) == before
    assert json.loads((run_dir / "exit.json").read_text("utf-8"))["exit_code"] == error.exit_code
    main([*command, "--fresh", "train.steps=1"])
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-00000001"]
    assert "changed since the last start" not in (run_dir / "log.txt").read_text("utf-8")


def test_fresh_takes_only_what_a_run_wrote_out_of_the_folders_of_a_run(world: Path, tmp_path: Path) -> None:
    run_dir, theirs = tmp_path / "project", ("samples/voice/a.wav", "errors/notes.txt", "checkpoints/mine/weights.bin")
    command = [str(world / "run.yaml"), f"train.run_dir={run_dir}", "train.eval_every_steps=0"]
    main([*command, "train.steps=2", "train.sample_every_steps=1"])
    written = ("errors/20260101-010203-77.txt", "errors/hang-20260101-010203-rank0.txt", "errors/hang",
               "samples/final/samples.json", "samples/final/cat.png")
    for name in (*theirs, *written):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("x")
    main([*command, "train.steps=1", "--fresh", "observe.tensorboard=false"])
    kept = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    gone = ("samples/step", "samples/final", "tensorboard")
    assert kept >= set(theirs) and not any(name.startswith(gone) for name in kept)
    assert {name for name in kept if name.startswith("errors")} == {"errors/notes.txt"}
    assert {Path(name).parts[1] for name in kept if name.startswith("checkpoints")} == {
        "mine", "latest", "step-00000001"}


@pytest.fixture
def long_run(start_train: Callable[..., subprocess.Popen], tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A run in tmp_path/mine that has saved and goes on."""
    process = start_train("mine", "train.steps=100000", "train.eval_every_steps=0", "observe.log_every_steps=100000")
    deadline = time.monotonic() + PATIENCE_SECONDS
    latest = tmp_path / "mine" / "checkpoints" / "latest"
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_in_one_directory_is_refused_and_one_that_was_killed_is_gone_on_with(
    long_run: subprocess.Popen, start_train: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    run_dir = tmp_path / "mine"
    second = start_train("mine", "--fresh")
    _, said = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 2 and said.count("\n") == 1, said
    assert f"ConfigError: train.run_dir = {run_dir}: another run goes on there" in said
    assert "one run at a time" in said and "another train.run_dir, or wait" in said
    assert long_run.poll() is None and (run_dir / "metrics.jsonl").is_file() and not (run_dir / "exit.json").exists()
    long_run.kill()
    third = start_train("mine", "train.steps=1")
    _, said = third.communicate(timeout=PATIENCE_SECONDS)
    assert third.returncode == 0 and "resumed from" in said, said


class Clock:
    """Time that passes in sleep alone; `then` happens after the first one."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.now, self._then = 0.0, then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._then()


@pytest.mark.parametrize("variable, value, seconds", [
    ("ERNIE5_RUN_DIR", "", 3), ("ERNIE5_RUN_DIR", "runs/mine", 120), ("TORCHELASTIC_RESTART_COUNT", "1", 120),
    ("TORCHELASTIC_RESTART_COUNT", "0", 3),
])
def test_the_end_of_a_run_is_waited_for_and_that_of_a_lost_machine_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    variable: str, value: str, seconds: int,
) -> None:
    if value:
        monkeypatch.setenv(variable, value)
    with (tmp_path / LOCK_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        clock = Clock(lambda: None)
        monkeypatch.setattr(module, "time", clock)
        with pytest.raises(ConfigError, match="another run goes on there"), held(tmp_path):
            pytest.fail("held twice")
        assert clock.now == pytest.approx(seconds, abs=0.2)
        assert len(caplog.messages) == (seconds == 120)
        clock = Clock(other.close)
        monkeypatch.setattr(module, "time", clock)
        with held(tmp_path), (tmp_path / LOCK_FILE).open("w") as third, pytest.raises(BlockingIOError):
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (tmp_path / LOCK_FILE).open("w") as third:
            fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_storage_without_locks_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module, "fcntl", types.SimpleNamespace(flock=refuse, LOCK_EX=0, LOCK_NB=0))
    with held(tmp_path), held(tmp_path):
        pass
    with held(tmp_path / "none"):
        pass
    with pytest.raises(OSError, match="of the run"), held(tmp_path):
        raise OSError("of the run")


@pytest.mark.parametrize("place, error", [("/proc/none/mine", EnvironmentFault), ("notes/mine", ConfigError)])
def test_a_place_that_takes_no_checkpoints_is_found_out_at_the_start(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[Ernie5Error]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(error, match=r"checkpoint.*(/proc/none/mine|notes/mine)"):
        main([str(world / "run.yaml"), "train.run_dir=run", f"checkpoint.dir={place}"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "run" / "exit.json").read_text("utf-8"))["exit_code"] == error.exit_code


def test_a_place_that_was_tried_and_not_used_is_not_left_behind(world: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for folder in ("kept", "new/deeper"):
        with pytest.raises(TokenizerError):
            main([str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", "tokenizers.text=/nowhere",
                  f"checkpoint.dir={tmp_path / folder}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "run"]
    assert not any((tmp_path / "kept").iterdir())


def test_a_folder_of_checkpoints_takes_one_run_while_it_goes_on_and_afterwards(
    start_train: Callable[..., subprocess.Popen], world: Path, tmp_path: Path
) -> None:
    folder, common = tmp_path / "far", (f"checkpoint.dir={tmp_path / 'far'}", "train.eval_every_steps=0")
    first = start_train("mine", *common, "train.steps=100000", "checkpoint.every_steps=0")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "mine" / "config.yaml").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    second = start_train("other", *common, "--fresh")
    _, said = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 2 and said.count("\n") == 1, said
    assert f"checkpoint.dir = {folder}: another run goes on there" in said and "another checkpoint.dir, or wait" in said
    first.terminate()
    first.communicate(timeout=PATIENCE_SECONDS)
    before = files_of(folder)
    assert any(name.startswith("step-") for name in before) and (tmp_path / "other" / "exit.json").is_file()
    arguments = [str(world / "run.yaml"), *common, "train.steps=1"]
    for more in ((), ("--fresh",), ("--resume", str(folder))):
        with pytest.raises(ConfigError, match=rf"has the checkpoints of the run in {tmp_path / 'mine'}\..*--resume"):
            main([*arguments, f"train.run_dir={tmp_path / 'other'}", *more])
    assert files_of(folder) == before


def test_a_run_that_moved_takes_its_checkpoints_along_and_another_one_does_not(world: Path, tmp_path: Path) -> None:
    command = [str(world / "run.yaml"), "train.eval_every_steps=0"]
    far = f"checkpoint.dir={tmp_path / 'far'}"
    main([*command, f"train.run_dir={tmp_path / 'one'}", far, "train.steps=1"])
    (tmp_path / "one").rename(tmp_path / "two")
    main([*command, f"train.run_dir={tmp_path / 'two'}", far, "train.steps=2"])
    (tmp_path / "link").symlink_to(tmp_path / "two")
    main([*command, f"train.run_dir={tmp_path / 'link'}", far, "train.steps=3"])
    with pytest.raises(ConfigError, match=f"goes on in {tmp_path / 'one'}, remove {tmp_path / 'link'}/config.yaml"):
        main([*command, f"train.run_dir={tmp_path / 'one'}", far, "train.steps=4"])
    (tmp_path / "two" / "config.yaml").unlink()  # the way out that is named
    main([*command, f"train.run_dir={tmp_path / 'one'}", far, "train.steps=4"])
    assert "resumed from" in (tmp_path / "one" / "log.txt").read_text("utf-8")
    main([*command, f"train.run_dir={tmp_path / 'plain'}", "train.steps=1"])
    with pytest.raises(ConfigError, match=f"of the run in {tmp_path / 'plain'}"):
        main([*command, f"train.run_dir={tmp_path / 'one'}", f"checkpoint.dir={tmp_path / 'plain' / 'checkpoints'}"])


def test_checkpoints_may_lie_in_the_run_directory_itself_whatever_its_name(world: Path, tmp_path: Path) -> None:
    """The run waited for its own lock there, and refused itself."""
    command, run_dir = [str(world / "run.yaml"), "train.eval_every_steps=0"], tmp_path / "run"
    main([*command, f"train.run_dir={run_dir}", f"checkpoint.dir={run_dir}", "train.steps=1"])
    (tmp_path / "link").symlink_to(run_dir)
    main([*command, f"train.run_dir={tmp_path / 'link'}", f"checkpoint.dir={run_dir}", "train.steps=2"])
    assert (run_dir / "step-00000002").is_dir() and "resumed from" in (run_dir / "log.txt").read_text("utf-8")


def test_a_configuration_of_ones_own_beside_the_checkpoints_makes_no_run_there(world: Path, tmp_path: Path) -> None:
    """Its folder was taken for the run that owns them: nothing began, and its removal was asked for."""
    (tmp_path / "config.yaml").write_bytes((world / "run.yaml").read_bytes())
    command = [str(tmp_path / "config.yaml"), f"train.run_dir={tmp_path / 'run'}", "train.eval_every_steps=0"]
    main([*command, f"checkpoint.dir={tmp_path / 'checkpoints'}", "train.steps=1"])
    assert (tmp_path / "checkpoints" / "step-00000001").is_dir()


def test_a_run_of_somebody_elses_that_cannot_be_looked_at_stops_nobody_who_has_its_checkpoints(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their user's folder is closed: that was an error of the machine."""
    command = [str(world / "run.yaml"), f"checkpoint.dir={tmp_path / 'far'}", "train.eval_every_steps=0"]
    theirs = tmp_path / "theirs" / "run"
    main([*command, f"train.run_dir={theirs}", "train.steps=1"])
    stat = Path.stat

    def closed(path: Path, **options: bool) -> os.stat_result:
        if path.is_relative_to(theirs):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", closed)
    main([*command, f"train.run_dir={tmp_path / 'mine'}", "train.steps=2"])
    assert "resumed from" in (tmp_path / "mine" / "log.txt").read_text("utf-8")


def test_a_lock_file_of_another_users_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be opened for writing, and nothing was held."""
    monkeypatch.setattr(module, "ENDING_SECONDS", 0.0)
    opened = Path.open

    def closed(path: Path, mode: str = "r", **options: object) -> object:
        if mode == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, **options)

    with held(tmp_path):
        monkeypatch.setattr(Path, "open", closed)
        with pytest.raises(ConfigError, match="another run goes on there"), held(tmp_path):
            pass
    with held(tmp_path):
        pass
