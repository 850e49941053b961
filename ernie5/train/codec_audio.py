"""Training task of the audio codec: crops of speech, spectral and adversarial losses, distillation of level 1."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ernie5.data.decode import decode_audio
from ernie5.data.shards import list_shards, open_corpus
from ernie5.errors import DataError
from ernie5.observe.files import replace_file
from ernie5.tokenizers.audio.losses import (
    Discriminators,
    SemanticTeacher,
    SpectralLoss,
    feature_distance,
    hinge_discriminator,
    hinge_generator,
    semantic_loss,
)
from ernie5.tokenizers.audio.quality import intelligibility, log_mel_distance
from ernie5.tokenizers.audio.rvq import CodebookAverages
from ernie5.tokenizers.audio.tokenizer import AudioTokenizer, save_audio_tokenizer
from ernie5.tokenizers.config import AudioTokenizerConfig, TokenizerRunConfig
from ernie5.train.codec_task import CodecClock, CodecFacts, CodecLosses, CodecTask

# Clips are recorded at different levels, and users' clips will be: loudness is drawn between -9 and +3 dB.
GAIN_DECIBELS = (-9.0, 3.0)
PEAK = 0.98
# Latents that k-means sees: 16 per code of the largest codebook here.
KMEANS_LATENTS = 16_384
VALIDATION_SECONDS = 3.0


class AudioCodec(nn.Module):
    """What is trained: the tokenizer, and the head through which level 1 meets the teacher (not exported)."""

    def __init__(self, config: AudioTokenizerConfig, *, teacher_width: int) -> None:
        super().__init__()
        self.tokenizer = AudioTokenizer(config)
        self.semantic_head = nn.Sequential(
            nn.Linear(config.code_width, 128), nn.GELU(), nn.Linear(128, teacher_width)
        )
        self.averages = CodebookAverages(config.code_width, levels=config.levels, codes=config.codes)
        # One after k-means has set the codebooks; a buffer, so that a resumed run knows.
        self.register_buffer("quantizing", torch.zeros((), dtype=torch.long))


@dataclass(frozen=True)
class AudioBatch:
    """waveform [B, S] fp32; levels [B] int64: how many quantiser levels each row decodes."""

    waveform: torch.Tensor
    levels: torch.Tensor


class SpeechClips:
    """All clips of a split in memory as 16-bit samples: an hour is 115 MB."""

    def __init__(self, clips: list[torch.Tensor]) -> None:
        self.clips = [(clip.clamp(-1.0, 1.0) * 32767.0).round().to(torch.int16) for clip in clips]
        self.weights = torch.tensor([float(len(clip)) for clip in clips])

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def seconds(self) -> float:
        """Length of all clips together at 16 kHz."""
        return float(self.weights.sum()) / 16_000

    def crop(self, samples: int, *, rows: int, generator: torch.Generator) -> torch.Tensor:
        """[rows, samples] fp32: places drawn evenly over all speech, loudness drawn too; short clips end in silence."""
        chosen = torch.multinomial(self.weights, rows, replacement=True, generator=generator)
        draws = torch.rand(rows, 2, generator=generator)
        low, high = GAIN_DECIBELS
        crops = []
        for index, (place, loudness) in zip(chosen.tolist(), draws.tolist(), strict=True):
            clip = self.clips[index]
            start = int(place * (max(0, len(clip) - samples) + 1))
            crop = clip[start : start + samples].float() / 32767.0
            gain = min(10.0 ** ((low + loudness * (high - low)) / 20.0), PEAK / max(float(crop.abs().max()), 1e-3))
            crops.append(functional.pad(crop * gain, (0, samples - len(crop))))
        return torch.stack(crops)


def load_speech(shards: tuple[str, ...], *, split: str) -> SpeechClips:
    """Decode every audio clip of `split`. Raises DataError when there is none."""
    corpus = open_corpus(list_shards(shards), split=split)
    clips = []
    for ref in corpus.samples("audio"):
        sample = corpus.read(ref)
        clips.append(decode_audio(sample.media[0].data, name=sample.key))
    if not clips:
        raise DataError(
            f"no audio clip of split {split} in {', '.join(shards)}. The audio codec needs speech: add shards with "
            f"samples of task audio."
        )
    return SpeechClips(clips)


class AudioCodecTask(CodecTask):
    """The audio codec for the loop of train/codec.py."""

    def __init__(self, config: AudioTokenizerConfig, *, train: SpeechClips, validation: SpeechClips) -> None:
        self.config = config
        self.train_clips = train
        self.validation_clips = validation
        self._teacher = SemanticTeacher(sample_rate=config.sample_rate, samples_per_frame=config.samples_per_frame)
        self._codec = AudioCodec(config, teacher_width=self._teacher.width)
        self._spectral = SpectralLoss(sample_rate=config.sample_rate)
        self._discriminators = Discriminators() if config.adversarial_weight > 0 else None
        self._level_shares = torch.tensor(config.level_shares)
        self._latents: torch.Tensor | None = None
        self._codes: torch.Tensor | None = None
        self._adversary_plays = False

    @property
    def codec(self) -> nn.Module:
        return self._codec

    @property
    def discriminator(self) -> nn.Module | None:
        return self._discriminators

    @property
    def score(self) -> str:
        return "score"

    def draw(self, clock: CodecClock, *, generator: torch.Generator) -> AudioBatch:
        rows = self.config.batch_clips
        samples = self.config.crop_frames * self.config.samples_per_frame
        waveform = self.train_clips.crop(samples, rows=rows, generator=generator)
        levels = torch.multinomial(self._level_shares, rows, replacement=True, generator=generator) + 1
        return AudioBatch(waveform, levels)

    def codec_losses(self, batch: AudioBatch, *, clock: CodecClock, generator: torch.Generator) -> CodecLosses:
        config, codec = self.config, self._codec
        latents = codec.tokenizer.encoder(batch.waveform).float()
        parts: dict[str, torch.Tensor | float] = {}
        total = latents.new_zeros(())
        if int(codec.quantizing):
            with torch.autocast("cpu", enabled=False):
                coded = codec.tokenizer.quantize(latents, active_levels=batch.levels)
            self._latents, self._codes = latents.detach(), coded.codes
            decoded_from, first = coded.latents, coded.first
            total = total + config.commitment_weight * coded.commitment
            parts["commitment"] = coded.commitment.detach()
        else:
            decoded_from = first = latents
        predicted = codec.semantic_head(first).float()
        semantic = semantic_loss(predicted, teacher=self._teacher(batch.waveform))
        waveform = codec.tokenizer.decoder(decoded_from)
        mel, bins = self._spectral(waveform, target=batch.waveform)
        total = total + mel + bins + config.semantic_weight * semantic
        parts |= {"mel": mel.detach(), "bins": bins.detach(), "semantic": semantic.detach()}
        ours, theirs = self._excerpt(waveform, target=batch.waveform, generator=generator)
        self._adversary_plays = self._discriminators is not None and clock.fraction >= config.adversarial_from
        if self._adversary_plays:
            adversarial, features = self._adversary(ours, target=theirs)
            total = total + config.adversarial_weight * adversarial + config.feature_weight * features
            parts |= {"adversarial": adversarial.detach(), "features": features.detach()}
        return CodecLosses(total, parts, reconstruction=ours, target=theirs)

    def _excerpt(
        self, waveform: torch.Tensor, *, target: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of a crop that the adversary judges: a quarter of the cost of judging all of it twice."""
        frames = self.config.adversarial_frames
        start = int(torch.randint(self.config.crop_frames - frames + 1, (), generator=generator))
        samples = self.config.samples_per_frame
        place = slice(start * samples, (start + frames) * samples)
        return waveform[:, place], target[:, place]

    def _adversary(self, ours: torch.Tensor, *, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        judges = self._discriminators.requires_grad_(False)
        with torch.no_grad():
            real = judges(target)
        fake = judges(ours)
        return hinge_generator(fake), feature_distance(real, fake=fake)

    def discriminator_loss(self, losses: CodecLosses, *, clock: CodecClock) -> torch.Tensor | None:
        if not self._adversary_plays:
            return None
        judges = self._discriminators.requires_grad_(True)
        return hinge_discriminator(judges(losses.target), fake=judges(losses.reconstruction.detach()))

    def after_step(self, clock: CodecClock, *, generator: torch.Generator) -> None:
        """Moves the codebooks; at the end of the continuous phase sets them from latents of the training clips."""
        codec = self._codec
        if self._codes is not None:
            codec.averages.update(
                codec.tokenizer.quantizer, latents=self._latents, codes=self._codes, generator=generator
            )
            self._latents = self._codes = None
        elif not int(codec.quantizing) and clock.fraction >= self.config.continuous_share:
            latents = self._some_latents(clock, generator=generator)
            codec.averages.start(codec.tokenizer.quantizer, latents=latents, generator=generator)
            codec.quantizing.fill_(1)

    @torch.no_grad()
    def _some_latents(self, clock: CodecClock, *, generator: torch.Generator) -> torch.Tensor:
        wanted = min(KMEANS_LATENTS, 16 * self.config.codes)
        steps = -(-wanted // (self.config.batch_clips * self.config.crop_frames))
        latents = [
            self._codec.tokenizer.encoder(self.draw(clock, generator=generator).waveform).flatten(0, 1)
            for _ in range(steps)
        ]
        return torch.cat(latents)

    def validate(self, codec: AudioCodec) -> dict[str, float]:
        """Log-mel distance in nepers and STOI for the first q levels, on the starts of validation clips.

        `score` is minus the distance at 4 and at all levels; once the adversary plays, 10 is added, because it trades
        some distance for naturalness that the distance does not see.
        """
        levels = self.config.levels
        if not int(codec.quantizing):
            return {"score": -100.0}
        distances = torch.zeros(levels)
        clear: list[list[float]] = [[] for _ in range(levels)]
        used = torch.zeros(levels, self.config.codes, dtype=torch.bool)
        clips = self.validation_clips.clips[:: max(1, len(self.validation_clips) // self.config.validation_clips)]
        clips = clips[: self.config.validation_clips]
        for clip in clips:
            target = (clip[: int(VALIDATION_SECONDS * self.config.sample_rate)].float() / 32767.0)[None]
            codes = codec.tokenizer.encode(target)
            for level in range(levels):
                used[level, codes[0, :, level]] = True
                waveform = codec.tokenizer.decode(codes[:, :, : level + 1])[:, : target.shape[1]]
                distances[level] += float(log_mel_distance(waveform, target=target)) / len(clips)
                clear[level].append(intelligibility(waveform[0], target=target[0]))
        quality = {f"log_mel_distance/{level + 1}": float(distances[level]) for level in range(levels)}
        for level in range(levels):
            quality[f"stoi/{level + 1}"] = float(torch.tensor(clear[level]).nanmean())
            quality[f"codes_used/{level + 1}"] = float(used[level].sum())
        middle = min(4, levels) - 1
        stage = 10.0 if self._adversary_plays else 0.0
        quality["score"] = stage - 0.5 * float(distances[middle] + distances[-1])
        return quality

    def export(self, codec: AudioCodec, directory: Path, *, facts: CodecFacts) -> None:
        save_audio_tokenizer(codec.tokenizer, directory=directory)
        quality = {"steps": facts.steps, "minutes": facts.minutes, **facts.quality}
        replace_file(directory / "quality.json", content=f"{json.dumps(quality, indent=1)}\n".encode())


def build_audio_task(config: TokenizerRunConfig) -> AudioCodecTask:
    """The task that `config` describes, its first weights drawn from train.seed. Raises DataError without speech."""
    torch.manual_seed(config.train.seed)
    return AudioCodecTask(
        config.tokenizer.audio,
        train=load_speech(config.data.shards, split="train"),
        validation=load_speech(config.data.shards, split="validation"),
    )
