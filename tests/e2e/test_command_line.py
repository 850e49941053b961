"""The command line as a user meets it: help everywhere, one line per mistake, the promised exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5 import __main__ as command_line
from ernie5.errors import NumericsError

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "pretrain" / "quickstart.yaml"
LAUNCHED = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def test_help_lists_every_verb_and_no_verb_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"ernie5 {verb.usage}" in printed for verb in command_line.VERBS.values())
    assert command_line.main([]) == 2


def test_a_mistyped_verb_gets_the_closest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["tarin"]) == 2
    assert "Did you mean `ernie5 train`?" in capsys.readouterr().err
    assert command_line.main(["xyz"]) == 2
    assert "Verbs: train" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(command_line.VERBS))
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([verb, "--help"]) == 0
    assert f"ernie5 {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", sorted(command_line.VERBS))
def test_a_verb_without_its_arguments_is_the_users_mistake(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([verb, "--no-such-option"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_describe_as_json_holds_the_tree_and_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["describe", str(QUICKSTART), "--json", "model.layers=7"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["model"]["layers"] == 7
    assert 0 < printed["num_active_params"] < printed["num_params"]
    assert printed["flops_per_token"] > 0
    assert {field["path"] for field in printed["fields"]} >= {"train.steps", "model.moe.balance.speed"}


def test_describe_as_text_names_the_line_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["describe", str(QUICKSTART)]) == 0
    printed = capsys.readouterr().out
    assert f"set in {QUICKSTART}:" in printed and "training FLOPs per token at 512 tokens" in printed


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["describe", "gone.yaml"], "there is no config file gone.yaml"),
        (["describe", str(QUICKSTART), "model.layer=3"], "Did you mean model.layers?"),
        (["describe", str(QUICKSTART), "model.layers=3"], "audio.levels"),
        (["describe", str(QUICKSTART), "model.moe.top_k=99"], "model.moe.top_k = 99"),
        (["describe", str(QUICKSTART), "parallel.tp=3"], "LayoutError: parallel.tp = 3"),
        (["describe", str(QUICKSTART), "batch.global_sequences=7"], "LayoutError: batch.global_sequences = 7"),
    ],
)
def test_a_user_error_is_one_line_with_exit_code_2(
    arguments: list[str], part: str, run_ernie5: Callable
) -> None:
    done = run_ernie5(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and part in done.stderr
    assert done.stderr.split(":")[0] in ("ConfigError", "LayoutError")


def raising(error: BaseException) -> Callable[[list[str]], int]:
    def main(_: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (NumericsError("loss is nan"), 4, "NumericsError: loss is nan\n"),
        (KeyboardInterrupt(), 75, "Interrupted: "),
        (MemoryError(), 3, "EnvironmentFault: "),
        (OSError(28, "No space left on device", "a"), 3, "EnvironmentFault: a: the disk is full"),
        (AssertionError("broken"), 1, "Traceback"),
    ],
)
def test_the_exit_code_of_a_verb_follows_its_exception(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ernie5.train import describe_command

    monkeypatch.setattr(describe_command, "main", raising(error))
    assert command_line.main(["describe", "x"]) == code
    assert text in capsys.readouterr().err


def test_a_closed_pipe_is_not_a_bug() -> None:
    done = subprocess.run(
        f"{sys.executable} -m ernie5 describe {QUICKSTART} --json | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_an_error_that_nobody_reads_keeps_its_code() -> None:
    unread, stderr = os.pipe()
    os.close(unread)
    command = [sys.executable, "-m", "ernie5", "train", "nowhere.yaml"]
    assert subprocess.run(command, stderr=stderr, timeout=60, check=False).returncode == 2
    os.close(stderr)


@pytest.mark.parametrize("rank", [["--local_rank=3"], ["--local-rank", "3"], ["--local_rank", "3"]])
def test_the_launched_entry_drops_the_launchers_rank_argument(rank: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    done = subprocess.run(
        [sys.executable, str(LAUNCHED), *rank, "gone.yaml", "--validate"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment,
    )
    assert done.returncode == 2 and "there is no config file gone.yaml" in done.stderr
