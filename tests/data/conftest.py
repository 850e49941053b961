"""Fixtures of the data tests: a small folder as a user would bring it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image


def write_image(path: Path, *, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> Path:
    colour = (10, 200, 30, 0) if mode == "RGBA" else (10, 200, 30)
    Image.new(mode, size, colour).save(path)
    return path


def write_clip(path: Path, *, frames: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for level in range(frames):
            array = np.full((32, 32, 3), 8 * level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_tone(path: Path, *, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> Path:
    time = np.arange(int(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)
    return path


@pytest.fixture
def media_writers() -> tuple[Callable[..., Path], Callable[..., Path], Callable[..., Path]]:
    """(write_image, write_clip, write_tone)."""
    return write_image, write_clip, write_tone


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """One sample of every kind that `ernie5 data build` recognises, and one file that it does not."""
    root = tmp_path / "mine"
    (root / "pages" / "cat").mkdir(parents=True)
    (root / "note.txt").write_text("A note.\nTwo lines.", "utf-8")
    (root / "read me.md").write_text("# No picture here", "utf-8")
    (root / "lines.jsonl").write_text('{"text": "eins", "language": "de"}\n\n{"text": "two"}\n', "utf-8")
    write_image(root / "dog.png")
    (root / "dog.txt").write_text("a dog", "utf-8")
    write_image(root / "cat.webp", mode="RGBA")
    captions = [{"language": "en", "text": "a cat"}, {"language": "zh", "text": "猫"}]
    (root / "cat.json").write_text(json.dumps({"captions": captions, "keywords": ["pet"], "group": "animals"}), "utf-8")
    write_clip(root / "fade.mp4", frames=5)
    (root / "fade.txt").write_text("it gets lighter", "utf-8")
    write_tone(root / "hello.wav")
    (root / "hello.json").write_text(json.dumps({"transcript": "привет", "language": "ru"}), "utf-8")
    write_image(root / "inline.png")
    (root / "story.md").write_text("Before ![shown](inline.png) after ![web](https://example.org/x.png) end.", "utf-8")
    write_image(root / "pages" / "cat" / "figure.png")
    segments = [{"text": "look"}, {"image": "figure.png"}, {"text": "there"}]
    (root / "pages" / "cat" / "page.json").write_text(json.dumps({"segments": segments}), "utf-8")
    (root / "site.html").write_text(
        "<head><title>no</title></head><p>Hi <b>you</b></p><script>no()</script><img src='inline.png'><p>Bye</p>",
        "utf-8",
    )
    (root / "table.csv").write_text("1,2", "utf-8")
    (root / ".hidden.txt").write_text("secret", "utf-8")
    return root


@pytest.fixture(scope="session")
def tiny_tokenizers():
    """Untrained tokenizers of a few thousand weights: visual stride 8 with scales 1, 2, 3, 4; audio with 2 levels."""
    import torch

    from ernie5.tokenizers.audio.tokenizer import AudioTokenizer
    from ernie5.tokenizers.bundle import bundle_tokenizers
    from ernie5.tokenizers.config import AudioTokenizerConfig, VisualTokenizerConfig
    from ernie5.tokenizers.text import train_text_tokenizer
    from ernie5.tokenizers.visual.tokenizer import VisualTokenizer

    torch.manual_seed(5)
    visual = VisualTokenizerConfig(
        stem_channels=8, channels=16, feature_channels=8, sizes=(1, 2, 3, 4), pixels=(32, 16), pixel_shares=(0.5, 0.5)
    )
    audio = AudioTokenizerConfig(
        levels=3, codes=16, code_width=8, mel_bands=20, encoder_widths=(16, 16, 16), encoder_depths=(0, 1, 1),
        decoder_widths=(16, 16, 16), decoder_depths=(1, 1, 0), batch_clips=2, crop_frames=6, adversarial_frames=4,
        level_shares=(0.3, 0.3, 0.4), validation_clips=2,
    )
    text = train_text_tokenizer(["a picture of a dog and the cat 猫 bark bark"] * 20, vocab_size=290)
    return bundle_tokenizers(
        text, visual=VisualTokenizer(visual).eval(), audio=AudioTokenizer(audio).eval(), audio_levels=2
    )


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one shard of all tasks, one long text, and one picture that cannot be decoded."""
    from ernie5.data.samples import Caption, Media, Sample, SampleMeta, Segment
    from ernie5.data.shards import ShardWriter

    folder = tmp_path_factory.mktemp("corpus")
    picture, clip, tone = folder / "p.png", folder / "c.mp4", folder / "t.wav"
    write_clip(clip, frames=5)
    samples = [
        Sample(f"text-{n}", SampleMeta(task="text", text=f"number {n} " + "the cat barks " * (3 + 40 * (n % 4 == 0))))
        for n in range(8)
    ]
    for n in range(6):
        write_image(picture, size=(32, 32 + n))
        captions = (Caption("en", f"a dog {n}"), Caption("zh", "猫"))
        media = (Media("png", picture.read_bytes()),)
        samples.append(Sample(f"image-{n}", SampleMeta(task="image", captions=captions), media))
        write_tone(tone, seconds=0.1 + 0.1 * n)
        media = (Media("wav", tone.read_bytes()),)
        samples.append(Sample(f"audio-{n}", SampleMeta(task="audio", transcript=f"word {n}"), media))
    samples.append(Sample("image-bad", SampleMeta(task="image", captions=captions), (Media("png", b"nothing"),)))
    for n in range(3):
        meta = SampleMeta(task="video", captions=(Caption("en", f"clip {n}"),), frames=5)
        samples.append(Sample(f"video-{n}", meta, (Media("mp4", clip.read_bytes()),)))
        segments = (Segment(text="look"), Segment(image="0.png"), Segment(text="and then " * (30 * n + 1)))
        media = (Media("0.png", picture.read_bytes()),)
        samples.append(Sample(f"page-{n}", SampleMeta(task="page", segments=segments), media))
    with ShardWriter(folder, prefix="tiny", max_bytes=1 << 24) as writer:
        for sample in samples:
            writer.write(dataclasses.replace(sample, meta=dataclasses.replace(sample.meta, split="train")))
    return folder


@pytest.fixture
def tiny_data(tiny_corpus: Path):
    """DataConfig over `tiny_corpus`: rows of 128, four streams, pictures of 4x4 cells, clips of two 2x2 frames."""
    from ernie5.data.config import DataConfig

    return DataConfig(
        shards=(str(tiny_corpus / "*.tar"),), sequence_tokens=128, image_pixels=32, video_pixels=16, video_frames=5
    )
