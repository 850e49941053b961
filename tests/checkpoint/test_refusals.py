"""The machine refuses while a checkpoint is written: each reason has its way out, and the checkpoint before stands."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_run
from ernie5.checkpoint.manifest import RunState
from ernie5.checkpoint.save import Contents, save_checkpoint
from ernie5.engine.interface import EngineState
from ernie5.errors import EnvironmentFault
from ernie5.evaluate.logits import save_logits
from ernie5.generate.media import write_file

NEW_MOUNTS = 0x00020000  # CLONE_NEWNS of linux/sched.h
NOBODY, SKIPPED = 65534, "SKIPPED"


def make_contents(step: int, *, values: int = 100) -> Contents:
    state = EngineState(
        parameters={"a.weight": torch.full((values, 100), float(step))}, buffers={}, moments={}, updates=step,
        magnitudes=torch.ones(4, dtype=torch.float64),
    )
    run = RunState(step=step, tokens=step, data={}, rng={}, spikes=0)
    return Contents(tuple(state.slices()), step, state.magnitudes, run, "train: {}\n", "fp32", {})


def save(folder: Path, step: int, *, values: int = 100) -> Path:
    return save_checkpoint(folder, contents=make_contents(step, values=values), config=CheckpointConfig())


def mount(folder: Path, *options: str) -> None:
    """In mounts of this process alone; the test is skipped where that is not allowed."""
    if ctypes.CDLL(None).unshare(NEW_MOUNTS) or subprocess.run(
        ["mount", "--make-rprivate", "/"], capture_output=True, check=False
    ).returncode or subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode:
        raise PermissionError(SKIPPED)


def limited(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def full(folder: Path) -> None:
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    mount(folder, "-t", "tmpfs", "-o", "size=96k", "none")
    shutil.copytree(kept, folder, dirs_exist_ok=True)


def read_only(folder: Path) -> None:
    mount(folder, "--bind", str(folder))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)


def forbidden(folder: Path) -> None:
    """To another user, for root may write everywhere."""
    folder.chmod(0o555)
    for path in folder.parents[:3]:
        path.chmod(0o755)
    if os.getuid() == 0:
        os.setresuid(NOBODY, NOBODY, NOBODY)


def removed(folder: Path) -> None:
    """By somebody else, in the middle of a save."""
    sync = os.fsync

    def remove_and_sync(descriptor: int) -> None:
        for half in folder.glob(".tmp-*"):
            shutil.rmtree(half)
        sync(descriptor)

    os.fsync = remove_and_sync


def no_quota(folder: Path) -> None:
    """As a file system with quotas answers, which none here has."""
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(folder))

    os.fsync = refuse


def in_a_child(action: Callable[[], str]) -> str:
    """What `action` says in a process of its own, which may spoil it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = action()
        except BaseException as error:
            said = SKIPPED if SKIPPED in str(error) else f"ended in {error!r}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    if said == SKIPPED:
        pytest.skip("this user may not mount")
    return said


@pytest.mark.parametrize(
    ("cause", "what", "way"),
    [
        (limited, "larger than the file system or `ulimit -f` allows", "or raise it"),
        (full, "the disk is full", "Free some space, then run the same command again"),
        (read_only, "that file system is read-only", "Choose another place, for example checkpoint.dir="),
        (forbidden, "permission denied", "Choose a place that you may write to, for example checkpoint.dir="),
        (removed, "the folder is not there", "Bring it back or choose another place, for example checkpoint.dir="),
        (no_quota, "the disk quota is used up", "Free some space or ask for more"),
    ],
)
def test_each_reason_has_its_way_out_and_the_checkpoint_before_stands(
    cause: Callable[[Path], None], what: str, way: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    first = save(folder, 1)

    def fail() -> str:
        cause(folder)
        try:
            return f"saved {save(folder, 2)}"
        except EnvironmentFault as error:
            loaded = load_run(folder)
            return f"{error.exit_code} {loaded.run.step} {error}"

    said = in_a_child(fail)
    folder.chmod(0o755)
    for path in folder.parents[:3]:
        path.chmod(0o700)
    assert said.startswith("3 1 saving to ") and "\n" not in said, said
    assert what in said and way in said and f"The previous checkpoint stands: {first}" in said, said
    assert ("Free" in said) == (cause in (full, no_quota)) and not list(folder.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("cause", "way"),
    [(limited, "or raise it"), (full, "Free some space"), (read_only, "Choose another place, for example")],
)
def test_logits_and_media_name_the_reason_too(cause: Callable[[Path], None], way: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    logits, picture = torch.zeros(1, 2, 100_000), b"x" * 800_000

    def fail() -> str:
        cause(folder)
        said = []
        for write in (lambda: save_logits(folder / "a.pt", logits=logits),
                      lambda: write_file(folder / "a.png", content=picture)):
            try:
                write()
            except EnvironmentFault as error:
                said.append(str(error))
        return "\n".join([*said, f"left: {sorted(path.name for path in folder.iterdir() if path.suffix != '.png')}"])

    lines = in_a_child(fail).splitlines()
    assert len(lines) == 3 and lines[-1] == "left: []" and all(way in line for line in lines[:-1]), lines
