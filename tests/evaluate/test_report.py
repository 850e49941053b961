"""The report page: complete, self-contained, and honest about what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from ernie5.errors import DataError
from ernie5.evaluate.figures import Evaluation, Figure, Loss, Timing, parse_evaluation
from ernie5.evaluate.report import write_report
from ernie5.evaluate.report_command import main
from ernie5.evaluate.routing import describe_routing
from ernie5.evaluate.run_facts import read_curves, read_run
from ernie5.generate import media
from ernie5.generate.manifest import Gallery, GalleryItem, save_gallery


def _run_dir(folder: Path) -> Path:
    lines = [{"step": s, "tokens": 100 * s, "loss/text": 9.0 / s, "step_seconds": 0.5} for s in range(1, 20)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _evaluation() -> Evaluation:
    figures = (
        Figure("a", "Better & <b>bold</b>", 2.0, 3.0, "order-2 model", "bits per byte", True, 10),
        Figure("b", "Worse", 0.4, 0.5, "chance", "%", False, 10),
        Figure("c", "Better, goal missed", 0.6, 0.5, "chance", "%", False, 10, goal=0.8),
        Figure("d", "Only measured", 2.0, 1.0, "xz -9", "bits per byte", True, 10, is_goal=False),
    )
    routing = describe_routing(torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0)))
    return Evaluation("ckpt", 19, (Loss("text", 0.5, 7),), figures, routing, (Timing("losses", 3.0),), ("no clips",))


def test_an_evaluation_survives_json(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(_evaluation().to_json())
    assert parse_evaluation(tmp_path / "e.json") == _evaluation()
    assert [figure.is_reached for figure in _evaluation().figures] == [True, False, False, False]


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path / "run <1>")
    (run_dir / "evaluation.json").write_text(_evaluation().to_json())
    folder = run_dir / "samples" / "step-19"
    media.write_file(folder / "a.png", content=media.encode_png(torch.zeros(3, 8, 8)))
    media.write_file(folder / "v.mp4", content=media.encode_mp4(torch.zeros(3, 5, 16, 16), frames_per_second=8))
    media.write_file(folder / "s.wav", content=media.encode_wav(torch.zeros(100), sample_rate=16000))
    items = (
        GalleryItem("text_to_image", "training", prompt="<script>", output_file="a.png", target_file="a.png"),
        GalleryItem("text_to_video", "validation", prompt="moves", output_file="v.mp4"),
        GalleryItem("text_to_audio", "free", prompt="hello", output_file="s.wav"),
        GalleryItem("image_to_text", "validation", prompt_file="a.png", output="", target="a face"),
        GalleryItem("image_reconstruction", "validation", output_file="a.png", target_file="a.png"),
    )
    save_gallery(folder, gallery=Gallery(19, 2.0, items))
    page = write_report(run_dir).read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "url(" not in page and "@import" not in page and "<script>" not in page
    assert "run &lt;1&gt;" in page and "<b>bold</b>" not in page
    for piece in ("data:image/png", "data:video/mp4", "data:audio/wav", "beats it", "not yet", "no clips", "(nothing)"):
        assert piece in page


def test_a_run_that_has_only_begun_still_gets_a_page(tmp_path: Path) -> None:
    run_dir = tmp_path / "young"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("")
    assert "Not evaluated yet" in write_report(run_dir).read_text()


def test_a_folder_that_is_no_run_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ernie5 train"):
        main([str(tmp_path)])
    with pytest.raises(DataError, match="not a directory"):
        main([str(tmp_path / "missing")])


def test_metrics_cut_by_a_kill_are_read_and_other_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 2, "loss": 1.25}\n{"step": 3, "lo')
    assert read_curves(path)["loss"].values == (2.0, 1.25)
    path.write_text('{"step": 1}\ngarbage\n{"step": 2}\n')
    with pytest.raises(DataError, match="metrics.jsonl:2"):
        read_curves(path)


def test_a_damaged_evaluation_or_gallery_is_named(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path / "run")
    (run_dir / "evaluation.json").write_text("[]")
    with pytest.raises(DataError, match="evaluation.json"):
        write_report(run_dir)
    (run_dir / "evaluation.json").unlink()
    folder = run_dir / "samples"
    save_gallery(folder, gallery=Gallery(1, 0.0, (GalleryItem("text_to_image", "free", output_file="gone.png"),)))
    with pytest.raises(DataError, match="gone.png"):
        write_report(run_dir)


def test_the_two_long_parts_of_the_time_are_split_and_nothing_is_lost(tmp_path: Path, repository: Path) -> None:
    run = _run_dir(tmp_path / "run")
    (run / "evaluation.json").write_text(_evaluation().to_json())
    named = {"pretrain": 20, "evaluate and generate": 5}
    for name, seconds in {"train the text tokenizer": 7, **named}.items():
        with (run / "timings.jsonl").open("a") as file:
            file.write(json.dumps({"name": name, "seconds": seconds}) + "\n")
    split = {timing.name: timing.seconds for timing in read_run(run).timings}
    assert split == {
        "train the text tokenizer": 7.0, "optimizer steps": 19 * 0.5, "start, validation, checkpoints": 20 - 19 * 0.5,
        "evaluation": 3.0, "loading and writing": 2.0,
    }
    script = (repository / "launch" / "quickstart.sh").read_text()
    assert all(f'part "{name}"' in script or f"part {name} " in script for name in named)
