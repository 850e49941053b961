"""Samples while a run is under way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.errors import DataError
from ernie5.train.command import main


def test_samples_appear_on_their_steps_and_do_not_change_the_losses(
    world: Path, tmp_path: Path, read_rows: Callable
) -> None:
    arguments = [str(world / "run.yaml"), "train.steps=2", "checkpoint.every_steps=0", "generate.max_text_tokens=4",
                 "generate.max_audio_frames=4", "generate.video_frames=5"]
    main([*arguments, f"train.run_dir={tmp_path / 'with'}", "train.sample_every_steps=1"])
    main([*arguments, f"train.run_dir={tmp_path / 'without'}"])
    gallery = tmp_path / "with" / "samples" / "step-00000001"
    assert {item["task"] for item in json.loads((gallery / "samples.json").read_text())["items"]} >= {"text_to_image"}
    assert list(gallery.glob("*.png")) and list(gallery.glob("*.wav")) and list(gallery.glob("*.mp4"))
    assert read_rows(tmp_path / "with") == read_rows(tmp_path / "without")


def test_samples_that_cannot_be_drawn_do_not_end_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise DataError("no such voice")

    monkeypatch.setattr("ernie5.train.samples.write_samples", refuse)
    run_dir = tmp_path / "run"
    changes = [f"train.run_dir={run_dir}", "train.steps=1", "train.sample_every_steps=1"]
    assert main([str(world / "run.yaml"), *changes]) == 0
    assert "no samples of step 1: no such voice" in (run_dir / "log.txt").read_text("utf-8")


def test_a_place_that_takes_no_samples_does_not_end_the_run(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "samples").write_text("a file where the folder should be")
    changes = [f"train.run_dir={run_dir}", "train.steps=1", "train.sample_every_steps=1", "generate.max_text_tokens=2",
               "generate.max_audio_frames=2", "generate.video_frames=1"]
    assert main([str(world / "run.yaml"), *changes]) == 0
    assert "no samples of step 1: Cannot write" in (run_dir / "log.txt").read_text("utf-8")
