"""A whole world in small: untrained tokenizers, a tiny model, and a corpus of every kind of sample."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ernie5.data.config import DataConfig
from ernie5.data.samples import Caption, Media, Sample, SampleMeta, Segment
from ernie5.data.shards import ShardWriter
from ernie5.generate.config import GenerateConfig
from ernie5.generate.interleave import Generation
from ernie5.generate.media import encode_mp4, encode_png, encode_wav
from ernie5.model.backbone import build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, VisualModelConfig
from ernie5.tokenizers.audio.tokenizer import AudioTokenizer
from ernie5.tokenizers.bundle import TokenizerBundle, bundle_tokenizers
from ernie5.tokenizers.config import AudioTokenizerConfig, VisualTokenizerConfig
from ernie5.tokenizers.text import train_text_tokenizer
from ernie5.tokenizers.visual.tokenizer import VisualTokenizer

COLORS = ("red", "green", "blue")


@dataclasses.dataclass(frozen=True)
class TinyWorld:
    """generation: an untrained model with its tokenizers; shards: one file with train and validation samples."""

    generation: Generation
    data: DataConfig
    shards: Path


def tiny_tokenizers() -> TokenizerBundle:
    """Untrained codecs of a few thousand weights, a vocabulary of 300 ids, two audio levels of 16 codes."""
    torch.manual_seed(0)
    visual = VisualTokenizerConfig(
        bits=4, sizes=(1, 2), stem_channels=8, channels=8, feature_channels=8, active_bits=(4,), active_from=(0.0,)
    )
    audio = AudioTokenizerConfig(
        levels=2, codes=16, code_width=4, encoder_widths=(8, 8, 8), encoder_depths=(0, 0, 1), decoder_widths=(8, 8, 8),
        decoder_depths=(1, 0, 0), level_shares=(0.5, 0.5),
    )
    text = train_text_tokenizer(["a red ball moves to the left", "say the blue word"] * 3, vocab_size=300)
    return bundle_tokenizers(
        text, visual=VisualTokenizer(visual).eval(), audio=AudioTokenizer(audio).eval(), audio_levels=2
    )


def tiny_model_config(tokenizers: TokenizerBundle, *, modalities: tuple[str, ...]) -> ModelConfig:
    """Three narrow layers of four experts that fit `tokenizers`."""
    visual = VisualModelConfig(bits=4, num_scales=2, patch_pixels=8, encoder_channels=8, vit_width=16, vit_layers=1,
                               vit_heads=2)
    return ModelConfig(
        layers=3, width=32, query_heads=2, kv_heads=1, head_width=16, vocab_size=tokenizers.vocab.size_head,
        dense_width=32, moe=MoEConfig(num_experts=4, top_k=2, expert_width=16), visual=visual,
        audio=AudioModelConfig(levels=2, codes=16), modalities=modalities,
    )


def build_world(folder: Path, *, modalities: tuple[str, ...] = ("text", "image", "video", "audio")) -> TinyWorld:
    """Write the corpus into `folder` and build everything else in memory."""
    tokenizers = tiny_tokenizers()
    data = DataConfig(image_pixels=16, video_pixels=16, video_frames=5, sequence_tokens=64,
                      shards=(str(folder / "tiny-000000.tar"),))
    model = build_model(tiny_model_config(tokenizers, modalities=modalities), seed=1).eval()
    config = GenerateConfig(max_text_tokens=4, max_audio_frames=3, video_frames=5)
    with ShardWriter(folder, prefix="tiny", max_bytes=1 << 24) as writer:
        for split in ("train", "validation"):
            for index in range(3):
                for sample in _samples(split, index):
                    writer.write(sample)
    return TinyWorld(Generation(model, tokenizers=tokenizers, data=data, config=config), data, writer.paths[0])


def _samples(split: str, index: int) -> list[Sample]:
    color = COLORS[index]
    image = torch.full((3, 16, 16), -0.9)
    image[index] = 0.9
    clip = torch.stack([image * (1 - frame / 8) for frame in range(5)], dim=1)
    wave = 0.4 * torch.sin(torch.arange(4000) * (index + 1) / 9.0)
    caption, name = (Caption("en", f"a {color} ball"),), f"{split}-{index}"
    png = encode_png(image)

    def meta(task: str) -> SampleMeta:
        empty = SampleMeta(task=task, language="en", split=split)
        return {
            "text": dataclasses.replace(empty, text=f"The {color} ball moves to the left. " * 6),
            "image": dataclasses.replace(empty, captions=caption, keywords=(color, "ball")),
            "video": dataclasses.replace(empty, captions=caption, motion="fade", frames=5, seconds=0.6),
            "audio": dataclasses.replace(empty, transcript=f"say {color}", seconds=0.25),
            "page": dataclasses.replace(empty, segments=(Segment(text="look"), Segment(image="0.png"))),
        }[task]

    return [
        Sample(f"text-{name}", meta("text")),
        Sample(f"image-{name}", meta("image"), (Media("png", png),)),
        Sample(f"video-{name}", meta("video"), (Media("mp4", encode_mp4(clip, frames_per_second=8)),)),
        Sample(f"audio-{name}", meta("audio"), (Media("wav", encode_wav(wave, sample_rate=16000)),)),
        Sample(f"page-{name}", meta("page"), (Media("0.png", png),)),
    ]
