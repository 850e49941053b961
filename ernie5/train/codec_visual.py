"""The visual tokenizer as a task of the codec loop: pictures first, clips with a share of pictures later."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ernie5.config.load import config_to_yaml
from ernie5.observe.files import replace_file
from ernie5.tokenizers.config import TokenizerRunConfig, VisualTokenizerConfig
from ernie5.tokenizers.losses import (
    PatchDiscriminator,
    commitment_loss,
    entropy_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    laplacian_loss,
    log_error,
    psnr,
)
from ernie5.tokenizers.visual.codec import fold_frames, unfold_frames
from ernie5.tokenizers.visual.quantizer import straight_through
from ernie5.tokenizers.visual.scales import resize_to, scale_schedule
from ernie5.tokenizers.visual.tokenizer import (
    VisualTokenizer,
    continue_visual_tokenizer,
    save_visual_tokenizer,
)
from ernie5.train.codec_task import CodecClock, CodecFacts, CodecLosses, CodecTask
from ernie5.train.visual_data import VisualSet, load_visual_set, resize_video, to_unit, vary

POOL_GRID = (4, 4)
VALIDATION_BATCH = 32
MAX_VALIDATION = 128


class VisualCodec(nn.Module):
    """What is trained: the tokenizer and the linear head of its semantic branch (which is not exported)."""

    def __init__(self, config: VisualTokenizerConfig, *, num_labels: int) -> None:
        super().__init__()
        self.tokenizer = VisualTokenizer(config)
        self.labels = nn.Linear(config.bits * POOL_GRID[0] * POOL_GRID[1], num_labels)

    def predict_labels(self, latents: torch.Tensor) -> torch.Tensor:
        """Quantised latents [B, d, f, h, w] -> logits [B, L] from their mean over time, pooled to 4x4 cells."""
        return self.labels(resize_to(latents.mean(2), POOL_GRID).flatten(1))


@dataclass(frozen=True)
class VisualBatch:
    """video [B, 3, F, H, W] fp32 in [-1, 1]; labels [B, L] fp32."""

    video: torch.Tensor
    labels: torch.Tensor


def active_bits_at(fraction: float, *, config: VisualTokenizerConfig) -> int:
    """Bits in use at a share of the budget (progressive switching, SPEC section 2)."""
    stages = zip(config.active_from, config.active_bits, strict=True)
    return [bits for start, bits in stages if fraction >= start][-1]


class VisualCodecTask(CodecTask):
    """Trains VisualCodec on a VisualSet; see the module docstring."""

    def __init__(
        self,
        config: TokenizerRunConfig,
        *,
        train: VisualSet,
        validation: VisualSet,
        device: torch.device = torch.device("cpu"),
    ) -> None:
        self._run_config = config
        self._config = config.tokenizer.visual
        self._train, self._validation = train.to(device), validation.to(device)
        torch.manual_seed(config.train.seed)
        self._codec = VisualCodec(self._config, num_labels=len(train.label_names))
        if self._config.start is not None:
            continue_visual_tokenizer(self._codec.tokenizer, place=self._config.start)
        self._discriminator = PatchDiscriminator() if self._config.adversarial_weight > 0 else None
        for network in (self._codec, self._discriminator):
            if network is not None:
                network.to(device)

    @property
    def codec(self) -> nn.Module:
        """The tokenizer with its semantic head."""
        return self._codec

    @property
    def discriminator(self) -> nn.Module | None:
        """The patch discriminator, where `adversarial_weight` is not 0."""
        return self._discriminator

    @property
    def score(self) -> str:
        """Mean of the validation PSNR of pictures and clips at the largest and the smallest side."""
        return "psnr_mean"

    def draw(self, clock: CodecClock, *, generator: torch.Generator) -> VisualBatch:
        """A batch of pictures, or of clips once `video_from` of the budget is spent; one side for the whole batch."""
        config = self._config

        def chance() -> float:
            return float(torch.rand((), generator=generator, device=generator.device))

        film = clock.fraction >= config.video_from and len(self._train.clips) > 0 and chance() < config.video_share
        shares = torch.tensor(config.pixel_shares, device=generator.device)
        side = config.pixels[int(torch.multinomial(shares, 1, generator=generator))]
        per_step = config.batch_images * (max(config.pixels) / side) ** 2 * (1.0 / config.video_frames if film else 1.0)
        source, labels = (
            (self._train.clips, self._train.clip_labels)
            if film
            else (self._train.pictures[:, :, None], self._train.picture_labels)
        )
        count = max(1, round(per_step))
        chosen = torch.randint(len(source), (count,), generator=generator, device=generator.device)
        video = vary(to_unit(source[chosen]), share=config.augment_share, generator=generator)
        return VisualBatch(resize_video(video, pixels=side), labels[chosen])

    def codec_losses(self, batch: VisualBatch, *, clock: CodecClock, generator: torch.Generator) -> CodecLosses:
        """Reconstruction, detail, commitment, entropy, semantic and (late) adversarial terms, weighted by config."""
        config, tokenizer = self._config, self._codec.tokenizer
        latents = fold_frames(tokenizer.to_latents(tokenizer.encode_features(batch.video)))
        schedule = scale_schedule(*latents.shape[-2:], sizes=config.sizes)
        bits = active_bits_at(clock.fraction, config=config)
        active = (torch.arange(latents.shape[1], device=latents.device) < bits).float()[:, None, None]
        latents = latents * active
        flips = self._flip_probability(len(latents), generator=generator)
        codes = tokenizer.quantizer.encode(
            latents, schedule=schedule, flip_probability=flips, generator=generator, active_bits=bits
        )
        through = unfold_frames(straight_through(latents, codes.finished), batch=len(batch.video))
        output, target = fold_frames(tokenizer.decoder(through)), fold_frames(batch.video)
        square, absolute = (output - target).square().mean(), (output - target).abs().mean()
        detail = laplacian_loss(output, target)
        commitment = commitment_loss(latents, codes)
        entropy = entropy_loss(latents, codes, schedule=schedule, active_bits=bits)
        logits = self._codec.predict_labels(through).float()
        semantic = functional.binary_cross_entropy_with_logits(logits, batch.labels)
        total = config.square_weight * square + config.absolute_weight * absolute + config.detail_weight * detail
        if config.log_weight > 0:
            total = total + config.log_weight * log_error(output, target)
        total = total + config.commitment_weight * commitment + config.entropy_weight * entropy
        total = total + config.semantic_weight * semantic
        parts = {"square": square.detach(), "detail": detail.detach(), "commitment": commitment.detach()}
        parts |= {"entropy": entropy.detach(), "semantic": semantic.detach(), "frames": float(batch.video.shape[2])}
        if self._plays(clock):
            adversarial = hinge_generator_loss(self._discriminator(output))
            total = total + config.adversarial_weight * adversarial
            parts["adversarial"] = adversarial.detach()
        return CodecLosses(total, parts, reconstruction=output, target=target)

    def _flip_probability(self, count: int, *, generator: torch.Generator) -> torch.Tensor:
        """[count, 1]: 0 for most frames, else uniform up to `flip_probability`."""
        config = self._config
        draws = torch.rand(2, count, 1, generator=generator, device=generator.device)
        return draws[1] * config.flip_probability * (draws[0] < config.flip_share)

    def _plays(self, clock: CodecClock) -> bool:
        return self._discriminator is not None and clock.fraction >= self._config.adversarial_from

    def discriminator_loss(self, losses: CodecLosses, *, clock: CodecClock) -> torch.Tensor | None:
        """Hinge loss on real and reconstructed pictures, from `adversarial_from` on."""
        if not self._plays(clock):
            return None
        real, fake = self._discriminator(losses.target), self._discriminator(losses.reconstruction.detach())
        return hinge_discriminator_loss(real, fake)

    def validate(self, codec: nn.Module) -> dict[str, float]:
        """PSNR (mean over samples of the sample's dB): per side, per scale count at the largest side, on clips."""
        tokenizer, figures = codec.tokenizer, {}
        pictures = self._validation.pictures[:MAX_VALIDATION, :, None]
        for side in self._config.pixels:
            figures[f"psnr_image_{side}"] = _mean_psnr(tokenizer, pictures, pixels=side)
        largest, smallest = max(self._config.pixels), min(self._config.pixels)
        grid = largest // tokenizer.stride
        for count in range(1, len(scale_schedule(grid, grid, sizes=self._config.sizes)) + 1):
            name = f"psnr_image_{largest}_scales_{count}"
            figures[name] = _mean_psnr(tokenizer, pictures, pixels=largest, num_scales=count)
        clips = self._validation.clips[:16]
        for side in (largest, smallest) if len(clips) else ():
            figures[f"psnr_video_{side}"] = _mean_psnr(tokenizer, clips, pixels=side)
        largest_and_smallest = [f"psnr_{kind}_{side}" for kind in ("image", "video") for side in (largest, smallest)]
        known = [figures[name] for name in largest_and_smallest if name in figures]
        figures["psnr_mean"] = sum(known) / len(known)
        figures["psnr_image_train"] = _mean_psnr(tokenizer, self._train.pictures[:64, :, None], pixels=largest)
        return figures

    def export(self, codec: nn.Module, directory: Path, *, facts: CodecFacts) -> None:
        """weights.safetensors, config.yaml and quality.json; the curves so far are copied beside them."""
        directory.mkdir(parents=True, exist_ok=True)
        save_visual_tokenizer(codec.tokenizer, directory)
        replace_file(directory / "config.yaml", content=config_to_yaml(self._run_config).encode())
        replace_file(directory / "quality.json", content=f"{json.dumps(asdict(facts), indent=1)}\n".encode())
        curves = directory.parent / "curves.jsonl"
        if curves.exists():
            shutil.copyfile(curves, directory / "curves.jsonl")


@torch.no_grad()
def _mean_psnr(
    tokenizer: VisualTokenizer, pixels_uint8: torch.Tensor, *, pixels: int, num_scales: int | None = None
) -> float:
    values = []
    for chunk in pixels_uint8.split(max(1, VALIDATION_BATCH // pixels_uint8.shape[2])):
        video = resize_video(to_unit(chunk), pixels=pixels)
        values.append(psnr(tokenizer.reconstruct(video, num_scales=num_scales), video))
    return round(float(torch.cat(values).mean()), 4)


def build_visual_task(config: TokenizerRunConfig, *, device: torch.device) -> VisualCodecTask:
    """Load the corpus that `config.data` names and build the task. Raises DataError without pictures."""
    visual = config.tokenizer.visual
    pixels = max(visual.pixels)
    train = load_visual_set(config.data.shards, split="train", pixels=pixels, frames=visual.video_frames)
    validation = load_visual_set(
        config.data.shards, split="validation", pixels=pixels, frames=visual.video_frames, label_names=train.label_names
    )
    return VisualCodecTask(config, train=train, validation=validation, device=device)
