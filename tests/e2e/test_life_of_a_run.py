"""The life of a run, from outside: train, kill -9, resume, inspect, generate, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "pretrain" / "debug.yaml"
STEPS = 6
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every_steps=2", "batch.global_sequences=2", "batch.micro_sequences=2",
            "observe.flush_every_steps=1", "train.routing_every_steps=2")
CUT_SETTINGS = ("evaluate.match_samples=2", "evaluate.caption_samples=2", "evaluate.loss_samples=1",
                "evaluate.training_text_bytes=20000", "evaluate.text_bytes=1000", "evaluate.caption_tokens=2")
PATIENCE_SECONDS = 600


@dataclasses.dataclass(frozen=True)
class Lives:
    """straight: a run without interruption; killed: the same one, killed once and resumed. Killed at `killed_at`."""

    straight: Path
    killed: Path
    killed_at: int


def _losses(run: Path) -> dict[int, list[float]]:
    """Losses and gradient norm per step, as printed, with full precision."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {row["step"]: [value for name, value in sorted(row.items()) if "loss" in name or name == "grad_norm"]
            for row in rows}


def _train(run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ernie5", "train", str(CONFIG), *SETTINGS, *CUT_SETTINGS, f"train.run_dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _wait(process: subprocess.Popen) -> None:
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, said


def _kill_in_the_middle(run: Path) -> int:
    """kill -9 as soon as a checkpoint and a step behind it are on disk; returns the last step that was recorded."""
    process, deadline = _train(run), time.monotonic() + PATIENCE_SECONDS
    while not (run / "metrics.jsonl").exists() or max(_losses(run), default=0) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run / "exit.json").exists()
    return max(_losses(run))


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Lives:
    folder = tmp_path_factory.mktemp("lives")
    straight, killed = folder / "straight", folder / "killed"
    _wait(_train(straight))
    killed_at = _kill_in_the_middle(killed)
    _wait(_train(killed))
    return Lives(straight, killed, killed_at)


def test_a_killed_run_goes_on_to_the_very_losses_of_the_uninterrupted_one(lives: Lives) -> None:
    assert lives.killed_at < STEPS
    assert list(_losses(lives.killed)) == list(range(1, STEPS + 1))
    assert repr(_losses(lives.killed)) == repr(_losses(lives.straight))
    assert json.loads((lives.killed / "exit.json").read_text("utf-8"))["exit_code"] == 0


def test_the_checkpoint_says_what_it_is(lives: Lives, run_ernie5: Callable) -> None:
    done = run_ernie5("inspect", lives.killed)
    assert done.exit_code == 0, done.stderr
    assert f"step {STEPS}" in done.stdout


@pytest.mark.parametrize(
    ("to", "name", "magic"),
    [("text", "t.txt", b""), ("image", "i.png", b"\x89PNG"), ("video", "v.mp4", b"ftyp"), ("audio", "a.wav", b"RIFF")],
)
def test_it_writes_draws_films_and_speaks(
    lives: Lives, run_ernie5: Callable, tmp_path: Path, to: str, name: str, magic: bytes
) -> None:
    done = run_ernie5(
        "generate", lives.killed, "--prompt", "a cat", "--to", to, "--out", tmp_path / name,
        "--max-tokens", "4", "--max-frames", "4", "--video-frames", "5",
    )
    assert done.exit_code == 0, done.stderr
    assert magic in (tmp_path / name).read_bytes()[:12]


def test_it_is_measured_and_reported(lives: Lives, run_ernie5: Callable) -> None:
    measured = run_ernie5("evaluate", lives.killed, "--json")
    assert measured.exit_code == 0, measured.stderr
    figures = json.loads(measured.stdout)
    assert set(figures["losses"]) == {"text", "image", "video", "audio"}
    assert {"text_bits_per_byte_order2", "text_to_image_nearest", "expert_load"} <= set(figures["figures"])
    reported = run_ernie5("report", lives.killed)
    assert reported.exit_code == 0, reported.stderr
    page = (lives.killed / "report.html").read_text("utf-8")
    assert "<svg" in page and "Text to image: nearer to its own target" in page


def test_it_is_verified_and_carried_out_with_its_logits(
    lives: Lives, run_ernie5: Callable, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    verified = run_ernie5("verify", lives.killed, "--all")
    assert verified.exit_code == 0 and "whole" in verified.stdout, verified.stderr
    refused = run_ernie5("convert", lives.killed, tmp_path / "hub", "--to", "ernie45-hf", "--text-only")
    assert refused.exit_code == 2 and "qk_norm" in refused.stderr and not (tmp_path / "hub").exists()
    exported = run_ernie5("convert", lives.killed, tmp_path / "export", "--to", "ernie5-hf")
    assert exported.exit_code == 0, exported.stderr
    ids = torch.randint(0, 4096, (2, 33), generator=torch.Generator().manual_seed(0))
    torch.save(ids, tmp_path / "ids.pt")
    done = run_ernie5("evaluate", lives.killed, "--logits", tmp_path / "ids.pt", "--out", tmp_path / "logits.pt")
    assert done.exit_code == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True).eval()
    with torch.no_grad():
        found = model(ids).logits
    assert (found - torch.load(tmp_path / "logits.pt")).abs().max() < 1e-4  # fp32 sums in another order
