"""Samples while a run is under way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

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
