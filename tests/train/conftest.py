"""Fixtures of the training tests: a tiny world of shards and untrained tokenizers, and a config over it, made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from ernie5.data.build import BuildOptions, build_corpus
from ernie5.tokenizers.audio.tokenizer import AudioTokenizer, save_audio_tokenizer
from ernie5.tokenizers.config import AudioTokenizerConfig, VisualTokenizerConfig
from ernie5.tokenizers.text import train_text_tokenizer
from ernie5.tokenizers.visual.tokenizer import VisualTokenizer, save_visual_tokenizer
from ernie5.tokenizers.vocab import Vocab

WORDS = ("red", "green", "blue", "small", "large", "round", "cat", "dog", "house", "tree", "runs", "sleeps")
NUM_EACH = 24


def _write_clip(path: Path, *, seed: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for frame in range(5):
            array = np.full((32, 32, 3), (seed * 37 + frame * 20) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def _write_sources(folder: Path) -> None:
    folder.mkdir()
    draws = np.random.default_rng(0)
    for index in range(NUM_EACH):
        words = " ".join(draws.choice(WORDS, size=6))
        (folder / f"text{index}.txt").write_text(" ".join(draws.choice(WORDS, size=30)), "utf-8")
        colour = tuple(int(value) for value in draws.integers(0, 256, 3))
        Image.new("RGB", (32, 32), colour).save(folder / f"image{index}.png")
        (folder / f"image{index}.txt").write_text(words, "utf-8")
        _write_clip(folder / f"clip{index}.mp4", seed=index)
        (folder / f"clip{index}.txt").write_text(words, "utf-8")
        wave = 0.3 * np.sin(np.arange(6000) * 0.02 * (index + 1))
        soundfile.write(folder / f"sound{index}.wav", wave, 16_000)
        (folder / f"sound{index}.json").write_text(json.dumps({"transcript": words, "language": "en"}), "utf-8")


def _write_tokenizers(folder: Path) -> Vocab:
    text = train_text_tokenizer([" ".join(WORDS)] * 4, vocab_size=300)
    text.save(folder / "text")
    torch.manual_seed(0)
    visual = VisualTokenizerConfig(stem_channels=8, channels=8, feature_channels=8, bits=4, active_bits=(4,),
                                   active_from=(0.0,), sizes=(1, 2, 3, 4), decoder_blocks=1)
    save_visual_tokenizer(VisualTokenizer(visual), folder / "visual")
    audio = AudioTokenizerConfig(levels=2, codes=16, code_width=4, encoder_widths=(8, 8, 8), encoder_depths=(1, 1, 1),
                                 decoder_widths=(8, 8, 8), decoder_depths=(1, 1, 1), level_shares=(0.5, 0.5))
    save_audio_tokenizer(AudioTokenizer(audio, identity=""), directory=folder / "audio")
    return Vocab(text_size=text.size, audio_levels=2, audio_codes=16)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, tokenizers and `run.yaml` (local engine, 6 steps, checkpoint every 2)."""
    root = tmp_path_factory.mktemp("world")
    _write_sources(root / "mine")
    build_corpus(BuildOptions(source=root / "mine", out=root / "shards", progress=False, max_video_frames=5))
    for name in ("text", "visual", "audio"):
        (root / name).mkdir(exist_ok=True)
    vocab = _write_tokenizers(root)
    config = {
        "train": {"steps": 6, "run_dir": str(root / "run"), "eval_every_steps": 3, "eval_batches": 1},
        "data": {
            "shards": [str(root / "shards" / "*.tar")], "sequence_tokens": 96, "streams": 2, "image_pixels": 32,
            "video_pixels": 16, "video_frames": 5,
        },
        "batch": {"global_sequences": 4, "micro_sequences": 1},
        "tokenizers": {"text": str(root / "text"), "visual": str(root / "visual"), "audio": str(root / "audio"),
                       "audio_levels": 2},
        "model": {
            "layers": 3, "width": 32, "query_heads": 2, "kv_heads": 1, "head_width": 16,
            "vocab_size": vocab.size_head, "dense_width": 48,
            "moe": {"num_experts": 8, "top_k": 2, "expert_width": 16},
            "visual": {"bits": 4, "num_scales": 4, "encoder_channels": 8, "vit_width": 16, "vit_layers": 1,
                       "vit_heads": 2},
            "audio": {"levels": 2, "codes": 16},
        },
        "optim": {"learning_rate": 3e-3},
        "engine": {"kind": "local", "cpu_threads": 1},
        "checkpoint": {"every_steps": 2, "keep": 2},
        "observe": {"tensorboard": False, "peak_tflops": 0.1, "progress": "off"},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config), "utf-8")
    return root


@pytest.fixture
def start_train(world: Path, tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Start `ernie5 train` on the tiny world in a process of its own; the run directory is `name` under tmp_path."""

    def start(name: str, *overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "ernie5", "train", str(world / "run.yaml"), f"train.run_dir={tmp_path / name}",
             *overrides],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.fixture
def read_rows() -> Callable[[Path], list[dict]]:
    """Rows of a metrics.jsonl without the figures that depend on the clock."""

    def read(run_dir: Path) -> list[dict]:
        lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
        clock = {"tokens_per_second", "mfu", "step_seconds", "data_seconds", "save/stall_seconds"}
        return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]

    return read
