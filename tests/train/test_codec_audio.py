"""The audio codec's training task on a few seconds of synthetic speech: phases, resuming, export, hostile corpora."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from ernie5.config.load import load_config
from ernie5.data.samples import Media, Sample, SampleMeta
from ernie5.data.shards import ShardWriter
from ernie5.errors import DataError
from ernie5.tokenizers.audio.tokenizer import load_audio_tokenizer
from ernie5.tokenizers.config import AudioTokenizerConfig, TokenizerRunConfig
from ernie5.train.codec import train_codec
from ernie5.train.codec_audio import AudioCodecTask, SpeechClips, load_speech
from ernie5.train.codec_task import CodecClock


def warble(seconds: float, *, seed: int) -> torch.Tensor:
    """A buzz with gliding pitch and syllables, so that spectra change from frame to frame."""
    time = torch.arange(int(16_000 * seconds)) / 16_000
    pitch = (110 + 20 * seed) * time + 3.0 * torch.sin(2 * math.pi * 2 * time)
    buzz = sum(torch.sin(2 * math.pi * k * pitch) / k for k in range(1, 12))
    return 0.1 * buzz * (1.1 + torch.sin(2 * math.pi * 4 * time))


@pytest.fixture
def debug(repository: Path) -> TokenizerRunConfig:
    return load_config(repository / "configs/tokenizer/audio_debug.yaml", schema=TokenizerRunConfig)


def build_task(config: AudioTokenizerConfig) -> AudioCodecTask:
    torch.manual_seed(0)
    train = SpeechClips([warble(1.0, seed=1), warble(0.2, seed=2), warble(0.7, seed=3)])
    return AudioCodecTask(config, train=train, validation=SpeechClips([warble(0.8, seed=4), warble(0.3, seed=5)]))


def test_crops_have_the_asked_length_whatever_the_clips_and_repeat_with_the_generator():
    clips = SpeechClips([warble(0.01, seed=1), warble(2.0, seed=2)])
    first, again = (clips.crop(8000, rows=40, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert first.shape == (40, 8000)
    torch.testing.assert_close(first, again)
    assert float(first.abs().max()) <= 0.99
    # A clip is drawn as often as it is long: 1 in 200 for the short one, which ends in silence.
    assert int((first[:, 4000:].abs().sum(1) == 0).sum()) <= 4


def test_a_short_run_quantises_then_plays_the_adversary_and_exports_a_codec(debug, tmp_path):
    task = build_task(debug.tokenizer.audio)
    facts = train_codec(task, config=debug.train, out=tmp_path, progress=False)
    curves = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    steps = [record for record in curves if "loss" in record]
    assert "commitment" not in steps[0] and "adversarial" not in steps[0]
    assert "commitment" in steps[-1] and "adversarial" in steps[-1] and "discriminator" in steps[-1]
    assert facts.quality["score"] > 5 and set(facts.quality) >= {"log_mel_distance/1", "log_mel_distance/3", "stoi/3"}
    codec = load_audio_tokenizer(tmp_path / "export")
    assert codec.encode(warble(0.5, seed=9)[None]).shape == (1, 7, 3)
    assert json.loads((tmp_path / "export" / "quality.json").read_text())["steps"] == debug.train.steps


def test_a_run_that_stops_and_resumes_ends_with_the_same_weights(debug, tmp_path):
    whole, halves = build_task(debug.tokenizer.audio), build_task(debug.tokenizer.audio)
    train_codec(whole, config=debug.train, out=tmp_path / "whole", progress=False)

    class Stop(Exception):
        """Ends the first half in place of a kill."""

    draw = halves.draw

    def draw_until_step_5(clock: CodecClock, *, generator: torch.Generator) -> object:
        if clock.step == 5:
            raise Stop
        return draw(clock, generator=generator)

    halves.draw = draw_until_step_5
    with pytest.raises(Stop):
        train_codec(halves, config=debug.train, out=tmp_path / "halves", progress=False)
    resumed = build_task(debug.tokenizer.audio)
    train_codec(resumed, config=debug.train, out=tmp_path / "halves", progress=False)
    for (name, one), other in zip(whole.codec.state_dict().items(), resumed.codec.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_the_adversary_does_not_learn_in_the_codecs_pass_nor_the_codec_in_the_adversarys(debug):
    config = dataclasses.replace(debug.tokenizer.audio, adversarial_from=0.0, continuous_share=0.0)
    task = build_task(config)
    generator = torch.Generator().manual_seed(0)
    clock = CodecClock(1, 0.5)
    task.after_step(clock, generator=generator)
    losses = task.codec_losses(task.draw(clock, generator=generator), clock=clock, generator=generator)
    losses.total.backward()
    assert all(parameter.grad is None for parameter in task.discriminator.parameters())
    assert all(parameter.grad is not None for parameter in task.codec.parameters())
    task.codec.zero_grad(set_to_none=True)
    task.discriminator_loss(losses, clock=clock).backward()
    assert all(parameter.grad is not None for parameter in task.discriminator.parameters())
    assert all(parameter.grad is None for parameter in task.codec.parameters())


def test_a_corpus_without_speech_is_refused(tmp_path):
    with ShardWriter(tmp_path, prefix="text", max_bytes=1_000_000) as writer:
        meta = SampleMeta(task="text", language="en", text="no sound", split="train")
        writer.write(Sample("a", meta, (Media("txt", b"no sound"),)))
    with pytest.raises(DataError, match="needs speech"):
        load_speech((str(tmp_path),), split="train")
