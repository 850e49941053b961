"""The visual codec task on a made-up picture set, and the command from YAML to a tokenizer that loads."""

import contextlib
import dataclasses
import json

import pytest
import torch

from ernie5.config.load import load_config
from ernie5.data.samples import SampleMeta
from ernie5.errors import ConfigError
from ernie5.tokenizers.config import TokenizerRunConfig
from ernie5.tokenizers.visual.tokenizer import load_visual_tokenizer
from ernie5.train.codec import train_codec
from ernie5.train.codec_task import CodecClock
from ernie5.train.codec_visual import VisualCodecTask, active_bits_at
from ernie5.train.visual_data import VisualSet, augment, labels_of, resize_video, vary


def blobs(count: int, *, seed: int) -> VisualSet:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 4, 4, generator=generator)
    clips = (torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(32, 32), mode="bilinear") * 255).byte()
    clips = clips.unflatten(0, (count, 3))
    labels = (torch.rand(count, 6, generator=generator) < 0.3).float()
    return VisualSet(clips[:, :, 0].clone(), clips, labels, labels, tuple("abcdef"))


@pytest.fixture
def run_config(repository) -> TokenizerRunConfig:
    return load_config(repository / "configs/tokenizer/visual_debug.yaml", schema=TokenizerRunConfig)


def task_of(run_config: TokenizerRunConfig) -> VisualCodecTask:
    return VisualCodecTask(run_config, train=blobs(8, seed=0), validation=blobs(3, seed=1))


def test_a_short_run_improves_exports_and_loads(run_config, tmp_path):
    task = task_of(run_config)
    before = task.validate(task.codec.eval())
    train = dataclasses.replace(run_config.train, steps=40, learning_rate=5e-3, validate_every_steps=20)
    facts = train_codec(task, config=train, out=tmp_path, progress=False)
    assert facts.quality["psnr_mean"] > before["psnr_mean"] + 2.0
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names == {"weights.safetensors", "config.yaml", "quality.json", "curves.jsonl"}
    loaded = load_visual_tokenizer(tmp_path / "export")
    assert loaded.reconstruct(torch.zeros(1, 3, 5, 32, 32)).shape == (1, 3, 5, 32, 32)
    assert {"psnr_video_32", "psnr_video_16", "psnr_image_32_scales_1", "psnr_image_32_scales_4"} <= set(facts.quality)


def test_a_run_with_muon_that_stops_goes_on_with_the_very_same_losses(run_config, tmp_path):
    def curve(out, *steps):
        for count in steps:
            train = dataclasses.replace(run_config.train, optimizer="muon", steps=12, validate_every_steps=4)
            stop = pytest.raises(KeyboardInterrupt) if count < 12 else contextlib.nullcontext()
            task = task_of(run_config)
            task.after_step = lambda clock, *, generator, count=count: interrupt_at(clock, count)
            with stop:
                train_codec(task, config=train, out=tmp_path / out, progress=False)
        lines = map(json.loads, (tmp_path / out / "curves.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def interrupt_at(clock, count):
        if clock.step == count:
            raise KeyboardInterrupt

    whole = curve("whole", 12)
    assert curve("parts", 6, 12) == whole and len(whole) == 6


def test_an_audio_codec_on_a_gpu_is_refused_by_name(repository):
    with pytest.raises(ConfigError, match="train.device = .*cuda trains kind visual"):
        load_config(repository / "configs/tokenizer/audio_debug.yaml", schema=TokenizerRunConfig,
                    overrides=("train.device=cuda",))


@pytest.mark.gpu
def test_a_run_on_a_gpu_learns_what_a_run_on_the_cpu_learns(run_config, tmp_path):
    train = dataclasses.replace(run_config.train, optimizer="muon", steps=60, learning_rate=5e-3, precision="bf16")
    sets = {"train": blobs(8, seed=0), "validation": blobs(3, seed=1)}
    figures = {}
    for device in ("cpu", "cuda"):
        task = VisualCodecTask(run_config, **sets, device=torch.device(device))
        figures[device] = train_codec(task, config=train, out=tmp_path / device, progress=False).quality["psnr_mean"]
    assert abs(figures["cpu"] - figures["cuda"]) < 1.5  # other random numbers, the same start and data
    loaded = load_visual_tokenizer(tmp_path / "cuda" / "export")
    assert loaded.reconstruct(torch.zeros(1, 3, 5, 32, 32)).isfinite().all()


def test_the_exported_config_trains_the_same_tokenizer_again(run_config, tmp_path):
    task = task_of(run_config)
    train_codec(task, config=run_config.train, out=tmp_path, progress=False)
    again = load_config(tmp_path / "export" / "config.yaml", schema=TokenizerRunConfig)
    assert again == run_config


def test_clips_are_drawn_only_after_their_phase_begins(run_config):
    task, generator = task_of(run_config), torch.Generator().manual_seed(0)
    early = [task.draw(CodecClock(0, 0.1), generator=generator).video.shape[2] for _ in range(20)]
    late = [task.draw(CodecClock(0, 0.9), generator=generator).video.shape[2] for _ in range(40)]
    assert set(early) == {1} and set(late) == {1, 5}


@pytest.mark.parametrize("fraction", [0.0, 0.6])
def test_every_loss_is_finite_and_reaches_the_encoder(run_config, fraction):
    visual = dataclasses.replace(run_config.tokenizer.visual, adversarial_weight=0.1, adversarial_from=0.5,
                                 video_share=1.0)
    run_config = dataclasses.replace(run_config, tokenizer=dataclasses.replace(run_config.tokenizer, visual=visual))
    task, generator = task_of(run_config), torch.Generator().manual_seed(0)
    clock = CodecClock(1, fraction)
    losses = task.codec_losses(task.draw(clock, generator=generator), clock=clock, generator=generator)
    losses.total.backward()
    assert torch.isfinite(losses.total) and task.codec.tokenizer.project.weight.grad.abs().sum() > 0
    assert ("adversarial" in losses.parts) == (fraction > 0.5)
    assert (task.discriminator_loss(losses, clock=clock) is not None) == (fraction > 0.5)


def test_progressive_switching_follows_its_stages(run_config):
    visual = run_config.tokenizer.visual
    assert active_bits_at(0.0, config=visual) == 8 and active_bits_at(0.5, config=visual) == 16


def test_augmentation_moves_all_frames_of_a_clip_alike_and_keeps_the_range():
    generator = torch.Generator().manual_seed(0)
    still = (torch.rand(6, 3, 1, 16, 16, generator=generator) * 2 - 1).expand(-1, -1, 5, -1, -1)
    moved = augment(still, generator=generator)
    assert moved.shape == still.shape and moved.abs().max() <= 1.0 + 1e-6
    for frame in range(1, 5):
        assert torch.equal(moved[:, :, frame], moved[:, :, 0])
    assert not torch.equal(moved, still)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_only_a_share_of_the_samples_is_augmented(share):
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(64, 3, 2, 8, 8, generator=generator) * 2 - 1
    before = clips.clone()
    varied = vary(clips, share=share, generator=generator)
    kept = ((varied == before) | (varied == before.flip(-1))).flatten(1).all(1)
    mirrored = (varied == before.flip(-1)).flatten(1).all(1)
    assert torch.equal(clips, before)
    assert abs(float((~kept).float().mean()) - share) < 0.15
    assert share == 1.0 or 0 < mirrored.sum() < kept.sum()


def test_a_second_stage_goes_on_from_the_first_with_new_layers(run_config, tmp_path):
    first = task_of(run_config)
    train_codec(first, config=run_config.train, out=tmp_path, progress=False)
    visual = dataclasses.replace(run_config.tokenizer.visual, start=str(tmp_path / "export"), decoder_attention=1,
                                 log_weight=0.3, augment_share=0.5)
    second = dataclasses.replace(run_config, tokenizer=dataclasses.replace(run_config.tokenizer, visual=visual))
    task = task_of(second)
    loaded = load_visual_tokenizer(tmp_path / "export")
    pictures = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 1, 32, 32)
    continued = task.codec.tokenizer.eval().reconstruct(pictures)
    # equal but for the order of fp32 sums, which depends on whether gradients are kept
    torch.testing.assert_close(continued, loaded.reconstruct(pictures), atol=1e-4, rtol=0)
    facts = train_codec(task, config=second.train, out=tmp_path / "second", progress=False)
    assert facts.steps == 12 and len(load_visual_tokenizer(tmp_path / "second/export").decoder.attention) == 1


@pytest.mark.parametrize("pixels", [16, 24, 32])
def test_resizing_clips_keeps_frames_and_constants(pixels):
    resized = resize_video(torch.full((2, 3, 5, 32, 32), 0.5), pixels=pixels)
    assert resized.shape == (2, 3, 5, pixels, pixels)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.5))


def test_labels_tell_keywords_groups_and_motions_apart():
    meta = SampleMeta(task="video", keywords=("cat",), group="cat", subgroup="x", motion="spin")
    assert labels_of(meta) == {"keyword/cat", "group/cat", "subgroup/x", "motion/spin"}
