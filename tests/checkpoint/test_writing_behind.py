"""Saving behind the training: one at a time, errors kept for whoever asks; and kills at random instants of a save."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_run
from ernie5.checkpoint.manifest import RunState
from ernie5.checkpoint.save import (
    Contents,
    begin_part,
    plan_part,
    prepare,
    publish,
    save_checkpoint,
    temporary_folder,
    write_part,
)
from ernie5.checkpoint.tensor_file import LazyTensor, begin_tensor_file, file_hash, write_tensor_file
from ernie5.checkpoint.writer import BackgroundWriter, SaveStatus
from ernie5.engine.interface import EngineState
from ernie5.errors import EnvironmentFault

KILLS = 12
NOBODY = 65534
TENSORS = {
    "b": torch.arange(15.0).view(3, 5), "a/ü": torch.arange(7).bfloat16(), "empty": torch.zeros(0, 4),
    "i": torch.arange(5), "scalar": torch.tensor(3.0, dtype=torch.float64), "large": torch.arange(5_000_000.0),
}


def contents_of(step: int, *, size: int = 64) -> Contents:
    weight = torch.full((size, size), float(step))
    engine = EngineState(
        parameters={"a": weight}, buffers={}, moments={"exp_avg/a": weight, "exp_avg_sq/a": weight}, updates=step,
        magnitudes=torch.zeros(4, dtype=torch.float64),
    )
    run = RunState(step=step, tokens=step, data={}, rng={})
    return Contents(tuple(engine.slices()), step, engine.magnitudes, run, "", "fp32", {})


def save_behind(folder: Path, *, contents: Contents, spoil: bool = False) -> Path:
    """As `Saver` does it for a single rank behind the training, which `spoil` stands for."""
    temporary = temporary_folder(folder, step=contents.run.step, token=str(os.getpid()))
    prepare(temporary)
    plan = plan_part(contents, behind=True)
    begin_part(temporary, plan=plan)
    if spoil:
        for part in contents.slices:
            part.values.zero_()
    write_part(temporary, plan=plan)
    return publish(temporary, contents=contents, config=CheckpointConfig(keep=1))


def test_the_streamed_file_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs")
    lazy = {name: LazyTensor(value.dtype, tuple(value.shape), value.clone) for name, value in TENSORS.items()}
    written = write_tensor_file(tmp_path / "ours", tensors=lazy)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written.file.sha256 == file_hash(tmp_path / "theirs")
    assert all(torch.equal(load_file(tmp_path / "ours")[name], value) for name, value in TENSORS.items())


@pytest.mark.parametrize("now", [{"b"}, {"large", "a/ü", "scalar"}, {"empty"}, set(TENSORS)])
def test_a_file_begun_with_some_tensors_is_the_same_in_the_end(now: set[str], tmp_path: Path) -> None:
    """Those that were begun are never asked for again, for they may be others by then."""
    lazy = {name: LazyTensor(value.dtype, tuple(value.shape), value.clone) for name, value in TENSORS.items()}
    expected = write_tensor_file(tmp_path / "at-once", tensors=lazy)
    begin_tensor_file(tmp_path / "begun", tensors=lazy, now=now)

    def gone() -> torch.Tensor:
        raise AssertionError("the values have changed since")

    later = {name: dataclasses.replace(one, load=gone) if name in now else one for name, one in lazy.items()}
    assert write_tensor_file(tmp_path / "begun", tensors=later, begun=now) == expected
    assert (tmp_path / "begun").read_bytes() == (tmp_path / "at-once").read_bytes()


def test_a_begun_file_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    lazy = {name: LazyTensor(value.dtype, tuple(value.shape), value.clone) for name, value in TENSORS.items()}
    begin_tensor_file(tmp_path / "begun", tensors=lazy, now=set(TENSORS))
    os.truncate(tmp_path / "begun", 1_000_000)
    with pytest.raises(OSError, match="became shorter"):
        write_tensor_file(tmp_path / "begun", tensors=lazy, begun=set(TENSORS))


class OnDevice(torch.Tensor):
    """A tensor that says that it is not in CPU memory, as one on a GPU does."""

    device = torch.device("cuda")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_training_changes_is_safe_once_a_save_has_begun(precision: str, tmp_path: Path) -> None:
    """Values on a device are copied, those in CPU memory are in the file: neither is read from live memory again."""
    contents = dataclasses.replace(contents_of(3), precision=precision)
    on_device = [part for part in contents.slices if part.key == "exp_avg/a"]
    slices = [
        dataclasses.replace(part, values=part.values.clone().as_subclass(OnDevice)) if part in on_device else part
        for part in contents.slices
    ]
    contents = dataclasses.replace(contents, slices=tuple(slices))
    expected = save_checkpoint(tmp_path / "waiting", contents=contents, config=CheckpointConfig())
    path = save_behind(tmp_path / "behind", contents=contents, spoil=True)
    assert len(on_device) == 1 and float(slices[0].values.sum()) == 0
    assert all((path / file.name).read_bytes() == file.read_bytes() for file in expected.iterdir())
    assert load_run(path).run.step == 3


def test_one_job_at_a_time_and_its_error_waits() -> None:
    writer, gate = BackgroundWriter(), threading.Event()

    def fail() -> Path:
        gate.wait()
        raise OSError("full")

    assert writer.status(wait=True) == SaveStatus.DONE
    writer.start(fail)
    assert writer.status(wait=False) == SaveStatus.RUNNING
    with pytest.raises(RuntimeError, match="still being written"):
        writer.start(fail)
    gate.set()
    assert writer.status(wait=True) == SaveStatus.FAILED
    with pytest.raises(OSError, match="full"):
        writer.result()
    writer.start(lambda: Path("x"))
    assert writer.result() == Path("x") and writer.status(wait=False) == SaveStatus.DONE


def test_a_save_killed_at_any_instant_leaves_a_whole_checkpoint(tmp_path: Path, read_state: Callable) -> None:
    """A child saves one step after another as fast as it can; each kill must leave at least the last one reported."""
    draws, step = random.Random(0), 0
    save_checkpoint(tmp_path / "c", contents=contents_of(0), config=CheckpointConfig(keep=1))
    for _ in range(KILLS):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            for number in range(step + 1, step + 1000):
                if number % 2:
                    save_behind(tmp_path / "c", contents=contents_of(number))
                else:
                    save_checkpoint(tmp_path / "c", contents=contents_of(number), config=CheckpointConfig(keep=1))
                os.write(write, f"{number}\n".encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as reports:
            first = int(reports.readline())
            time.sleep(draws.uniform(0.0, 0.1))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported = [first, *map(int, reports.read().split())]
        loaded = load_run(tmp_path / "c")  # checks every checksum
        assert loaded.run.step >= max(reported)
        assert torch.equal(read_state(loaded.engine).parameters["a"], torch.full((64, 64), float(loaded.run.step)))
        step = loaded.run.step
    assert step >= KILLS


def test_a_folder_that_may_not_be_written_leaves_the_previous_checkpoint_and_names_it(tmp_path: Path) -> None:
    """As another user, for root may write everywhere."""
    folder = tmp_path / "c"
    first = save_checkpoint(folder, contents=contents_of(1), config=CheckpointConfig())
    for path in (*tmp_path.parents[:2], tmp_path):
        path.chmod(0o755)
    folder.chmod(0o555)
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        try:
            save_checkpoint(folder, contents=contents_of(2), config=CheckpointConfig())
        except EnvironmentFault as error:
            os._exit(0 if f"The previous checkpoint stands: {first}" in str(error) else 2)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for path in (*tmp_path.parents[:2], tmp_path):
        path.chmod(0o700)
    folder.chmod(0o755)
    assert code == 0
    assert load_run(folder).run.step == 1
