"""Log lines reach stderr and the file; progress stays calm where there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie5.observe import progress
from ernie5.observe.log import get_log, open_log
from ernie5.observe.progress import Progress


def test_rank_zero_logs_everything_and_other_ranks_only_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_log(tmp_path).info("hello")
    other = open_log(tmp_path, rank=3)
    other.info("silent")
    other.warning("careful")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and lines[0].endswith("INFO hello") and lines[1].endswith("[rank 3] WARNING careful")
    assert capsys.readouterr().err.count("\n") == 2


def test_opening_the_log_twice_does_not_double_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_log(tmp_path)
    open_log(None).warning("once")
    assert capsys.readouterr().err.count("once") == 1
    assert "once" not in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_disk_that_takes_no_line_is_said_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    log = open_log(tmp_path)
    for word in ("one", "two", "three"):
        log.info(word)
    open_log(None)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and "Traceback" not in said[1], said
    assert "log.txt cannot be written (No space left on device): the log goes on here" in said[1]


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_log(None)
    with Progress(10, title="train") as bar:
        bar.advance(3, note="loss 2")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_SECONDS", 0.0)
    with Progress(10, title="train", done=2) as bar:
        bar.advance(3, note="loss 2")
    printed = capsys.readouterr().err
    assert "train: 5/10 steps" in printed and "loss 2" in printed and "\r" not in printed


def test_progress_can_be_forced_and_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, title="forced", mode="on") as bar:
        bar.advance(2)
    assert "forced" in capsys.readouterr().err
    with Progress(2, title="quiet", mode="off") as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""
    assert get_log().name == "ernie5"
