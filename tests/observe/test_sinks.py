"""metrics.jsonl survives kills and resumes; optional sinks say what they need."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from ernie5.errors import EnvironmentFault
from ernie5.observe.config import ObserveConfig
from ernie5.observe.metrics import Figures, Metrics
from ernie5.observe.sinks import (
    JsonlSink,
    MetricRow,
    TensorBoardSink,
    WandbSink,
    keep_until_step,
    open_sinks,
    read_metrics,
)


def write_steps(path: Path, *, first: int, last: int, last_step: int) -> None:
    sink = JsonlSink(path, last_step=last_step)
    for step in range(first, last + 1):
        sink.write(MetricRow(step, ("loss",), (1.0 / step,)))
    sink.close()


def steps_of(path: Path) -> list[int]:
    return [row.step for row in read_metrics(path)]


def test_resuming_at_a_step_drops_later_lines_and_goes_on_without_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, first=1, last=7, last_step=0)
    write_steps(path, first=5, last=6, last_step=4)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_start_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, first=1, last=3, last_step=0)
    write_steps(path, first=1, last=1, last_step=0)
    assert steps_of(path) == [1]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4', "\x00\x00\x00", '{"st', "4", '{"step": 4}'])
def test_a_line_that_a_kill_tore_is_dropped_at_resume(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, first=1, last=3, last_step=0)
    path.write_text(path.read_text(encoding="utf-8") + torn, encoding="utf-8")
    assert steps_of(path)[:3] == [1, 2, 3]
    write_steps(path, first=4, last=4, last_step=3)
    assert steps_of(path) == [1, 2, 3, 4]
    assert all(json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines())


def test_a_torn_row_is_not_dropped_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, first=1, last=3, last_step=0)
    keep_until_step(path, last_step=2)
    assert not caplog.messages
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    keep_until_step(path, last_step=2)
    assert len(caplog.messages) == 1
    assert f"{path}: row 3 is torn" in caplog.messages[0] and "goes on after step 2" in caplog.messages[0]
    assert steps_of(path) == [1, 2]


def test_a_file_without_later_lines_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, first=1, last=3, last_step=0)
    inode = path.stat().st_ino
    keep_until_step(path, last_step=3)
    assert path.stat().st_ino == inode
    keep_until_step(path, last_step=2)
    assert path.stat().st_ino != inode


def test_numbers_keep_full_precision_and_nan_is_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, last_step=0)
    third = float(torch.tensor(1 / 3, dtype=torch.float32))
    sink.write(MetricRow(1, ("a", "b", "c", "tokens"), (third, math.nan, math.inf, 4096)))
    sink.close()
    line = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert line == {"step": 1, "a": third, "b": None, "c": None, "tokens": 4096}
    assert math.isnan(read_metrics(path)[0].value("b"))


def test_tensorboard_events_are_written_beside_the_jsonl(tmp_path: Path) -> None:
    sinks = open_sinks(ObserveConfig(), run_dir=tmp_path, steps=100)
    metrics = Metrics(sinks)
    figures = Figures(step=1)
    figures.add("loss/text", torch.tensor(2.5))
    metrics.record(figures)
    metrics.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_tensorboard_folder_that_was_removed_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = TensorBoardSink(tmp_path, last_step=0)

    def refuse(*_: object, **__: object) -> None:  # the path as TensorBoard names it
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), bytes(tmp_path / "events"))

    monkeypatch.setattr(sink._writer, "add_scalar", refuse)
    with pytest.raises(EnvironmentFault, match=rf"to {tmp_path} failed: .*removed.*\({tmp_path}/events\)\. Bring it"):
        sink.write(MetricRow(1, ("loss",), (2.0,)))


def test_a_missing_wandb_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentFault, match="pip install wandb"):
        WandbSink(tmp_path, project="p")
