"""Every exception has one exit code; bugs keep their traceback, the machine's faults name the way out."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from ernie5.errors import CheckpointError, EnvironmentFault, Interrupted, NumericsError, PeerError
from ernie5.observe.faults import classify, keep_tracebacks


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("x"), 2),
        (EnvironmentFault("x"), 3),
        (NumericsError("x"), 4),
        (PeerError("x"), 5),
        (Interrupted("x"), 75),
        (KeyboardInterrupt(), 75),
        (MemoryError(), 3),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), 3),
        (RuntimeError("The server socket has failed to listen. port: 29500, code: -98, name: EADDRINUSE"), 3),
        (OSError(errno.EFBIG, "File too large", "a.bin"), 3),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 3),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 3),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1),
        (ValueError("x"), 1),
        (RuntimeError("shape mismatch"), 1),
    ],
)
def test_an_exception_maps_to_the_exit_code_of_its_kind(error: BaseException, code: int) -> None:
    fault = classify(error)
    assert fault.exit_code == code and fault.is_bug == (code == 1)


def test_the_machines_faults_name_the_file_and_the_way_out() -> None:
    line = classify(OSError(errno.ENOSPC, "No space left on device", "runs/a.bin")).line()
    assert line.startswith("EnvironmentFault: runs/a.bin: the disk is full. Free some space")


def test_what_was_perhaps_only_read_is_not_said_to_need_another_place_to_write() -> None:
    line = classify(PermissionError(errno.EACCES, "Permission denied", "shards/a.tar")).line()
    assert line.startswith("EnvironmentFault: shards/a.tar: permission denied. Name a place that you may read")
    assert "train.run_dir" not in line


def test_a_bug_is_saved_and_noted_and_a_user_error_is_not(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), keep_tracebacks(tmp_path):
        raise CheckpointError("gone")
    assert not (tmp_path / "errors").exists()
    with pytest.raises(ZeroDivisionError) as caught, keep_tracebacks(tmp_path):
        print(1 / 0)
    (kept,) = (tmp_path / "errors").iterdir()
    assert "ZeroDivisionError" in kept.read_text(encoding="utf-8") and str(kept) in caught.value.__notes__[0]


def test_a_bug_on_a_full_or_forbidden_disk_stays_the_bug(tmp_path: Path) -> None:
    (tmp_path / "errors").write_text("a file in the way", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), keep_tracebacks(tmp_path):
        print(1 / 0)


def full_disk_line(error: Exception, *, run_dir: Path) -> str:
    with pytest.raises(Exception, match="No space|disk is full") as caught, keep_tracebacks(run_dir):
        raise error
    return classify(caught.value).line()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on device (os error 28)")],
)
def test_a_full_disk_that_names_no_file_is_named_by_the_run_directory_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=0))
    line = full_disk_line(error, run_dir=tmp_path)
    assert line.startswith(f"EnvironmentFault: {tmp_path}: the disk is full. Free some space")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1 << 30))
    assert full_disk_line(error, run_dir=tmp_path).startswith("EnvironmentFault: the disk is full")
