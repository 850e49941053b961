"""`ernie5 data inspect` and the command line of `ernie5 data`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.data.command import main
from ernie5.data.inspect import describe_corpus
from ernie5.data.shards import Media, Sample, SampleMeta, ShardWriter


def test_build_then_inspect_counts_what_is_there(
    user_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(user_folder), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "1 audio, 2 image, 3 page, 4 text, 1 video" in captured.out
    assert "table.csv" in captured.err
    assert main(["inspect", str(tmp_path / "out"), "--json", "--decode"]) == 0
    found = json.loads(capsys.readouterr().out)
    tasks = {task["task"]: task for task in found["tasks"]}
    assert {name: task["samples"] for name, task in tasks.items()} == {
        "text": 4, "image": 2, "video": 1, "audio": 1, "page": 3
    }
    assert tasks["text"]["languages"] == {"en": 3, "de": 1}
    assert tasks["audio"]["seconds"] == 0.5 and tasks["video"]["seconds"] == pytest.approx(0.6, abs=0.05)
    assert sum(sum(task["splits"].values()) for task in found["tasks"]) == 11
    assert found["failures"] == []


def test_the_table_shows_tasks_and_as_many_samples_as_asked(
    user_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["build", str(user_folder), "--out", str(tmp_path / "out"), "--quiet"])
    capsys.readouterr()
    main(["inspect", str(tmp_path / "out"), "--samples", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["task", "samples", "train", "valid.", "bytes", "minutes", "characters", "languages"]
    assert sum(line.startswith("image ") for line in lines) == 3
    assert any("a cat / zh: 猫" in line for line in lines)


def test_samples_that_do_not_decode_are_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, prefix="x", max_bytes=10**6) as writer:
        writer.write(Sample("bad", SampleMeta(task="image"), (Media("png", b"junk"),)))
        writer.write(Sample("fine", SampleMeta(task="text", text="words")))
    description = describe_corpus((str(tmp_path),), decode=True)
    assert len(description.failures) == 1 and "bad" in description.failures[0]


def test_a_missing_shard_ends_in_one_line_and_exit_code_2(run_ernie5: Callable, tmp_path: Path) -> None:
    result = run_ernie5("data", "inspect", tmp_path / "gone.tar")
    assert result.exit_code == 2
    assert "gone.tar" in result.stderr and "Traceback" not in result.stderr


def test_words_that_the_terminal_cannot_show_are_printed_as_numbers(
    run_ernie5: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ShardWriter(tmp_path, prefix="x", max_bytes=10**6) as writer:
        writer.write(Sample("a", SampleMeta(task="text", text="caf\xe9 猫")))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = run_ernie5("data", "inspect", tmp_path)
    assert result.exit_code == 0 and r"text a: caf\xe9 \u732b" in result.stdout
