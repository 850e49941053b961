"""Configuration of the tokenizers: which ones a model uses, what each is made of, and how one is trained."""

from __future__ import annotations

import math

from ernie5.config.base import Config, config
from ernie5.config.field import at_least, field, fraction, non_negative, positive

SAMPLE_RATE = 16_000
TEACHER_STEPS = 8  # of the semantic teacher in a codec frame
HEAD_CHANNELS = 32  # of an attention head of the visual decoder
SMALLEST_JUDGED = 8  # px, a side that the patch discriminator of losses.py has a score for
JUDGED_SAMPLES = 3073  # the fewest that every discriminator of audio/losses.py can judge


@config
class TokenizersConfig(Config):
    """The tokenizers of a run (key `tokenizers` of a pretraining config)."""

    text: str = field(
        "embedded", doc="text vocabulary: `embedded`, or a path to a saved one or a tokenizer.json", is_path=True
    )
    visual: str = field(
        "embedded", doc="visual tokenizer: `embedded`, or the directory of a trained one", is_path=True
    )
    audio: str = field("embedded", doc="audio tokenizer: `embedded`, or the directory of a trained one", is_path=True)
    audio_levels: int = field(4, doc="codec levels the model uses, the first of those trained", check=positive)


@config
class VisualTokenizerConfig(Config):
    """The visual codec, its quantiser and its losses (tokenizers/visual/README.md explains the choices)."""

    patch: int = field(4, doc="pixels folded into channels before the first layer", check=positive, kind="architecture")
    bits: int = field(16, doc="latent channels d, one bit each per cell", check=positive, kind="architecture")
    sizes: tuple[int, ...] = field(
        (1, 2, 3, 4, 6, 8), doc="grid sides of the scales of the largest picture", check=positive, kind="architecture"
    )
    stem_channels: int = field(96, doc="channels at stride 4", check=positive, kind="architecture")
    channels: int = field(192, doc="channels at stride 8", check=positive, kind="architecture")
    feature_channels: int = field(64, doc="channels A of the features before quantisation", kind="architecture")
    stem_blocks: int = field(1, doc="residual blocks at stride 4 of the encoder", kind="architecture")
    encoder_blocks: int = field(1, doc="residual blocks at stride 8 of the encoder", kind="architecture")
    decoder_blocks: int = field(2, doc="residual blocks at stride 8 of the decoder", kind="architecture")
    decoder_attention: int = field(
        0, doc="attention blocks at stride 8 of the decoder", check=non_negative, kind="architecture"
    )
    head_blocks: int = field(1, doc="residual blocks at stride 4 of the decoder", kind="architecture")
    start: str | None = field(
        None, doc="trained tokenizer to go on from: `embedded`, a directory; null: from scratch", is_path=True
    )

    square_weight: float = field(4.0, doc="squared error of pixels in [-1, 1]", check=non_negative)
    log_weight: float = field(0.0, doc="mean log of each frame's squared error, PSNR itself", check=non_negative)
    absolute_weight: float = field(0.25, doc="absolute error of pixels", check=non_negative)
    commitment_weight: float = field(0.1, doc="pull of the latents towards their codes", check=non_negative)
    entropy_weight: float = field(0.02, doc="sure bits per cell, even bits over the batch", check=non_negative)
    detail_weight: float = field(0.5, doc="Laplacian-pyramid L1, perceptual in style", check=non_negative)
    adversarial_weight: float = field(0.0, doc="hinge loss of the patch discriminator", check=non_negative)
    adversarial_from: float = field(0.8, doc="share of the budget after which the adversary plays", check=fraction)
    semantic_weight: float = field(0.01, doc="label prediction from pooled codes", check=non_negative)
    flip_share: float = field(0.25, doc="share of pictures whose codes are corrupted in training", check=fraction)
    flip_probability: float = field(0.05, doc="largest bit-flip probability of a corrupted picture", check=fraction)
    active_bits: tuple[int, ...] = field((8, 16), doc="progressive switching: bits in use, stage by stage")
    active_from: tuple[float, ...] = field((0.0, 0.05), doc="share of the budget at which each stage starts")

    augment_share: float = field(1.0, doc="share of samples moved and recoloured, others mirrored", check=fraction)
    pixels: tuple[int, ...] = field((64, 48, 32), doc="picture sides drawn in training", check=positive)
    pixel_shares: tuple[float, ...] = field((0.7, 0.1, 0.2), doc="how often each side is drawn", check=fraction)
    batch_images: int = field(8, doc="pictures of the largest side per step, others by equal area", check=positive)
    video_from: float = field(0.55, doc="share of the budget after which clips are drawn", check=fraction)
    video_share: float = field(0.5, doc="share of steps on clips from then on", check=fraction)
    video_frames: int = field(17, doc="frames of a clip, 1+4n", check=positive)

    def validate(self) -> None:
        if len(self.active_bits) != len(self.active_from) or list(self.active_from) != sorted(self.active_from):
            self.fail("active_from", "needs one ascending share of the budget per entry of active_bits.")
        if self.active_from[:1] != (0.0,):
            self.fail("active_from", "must begin with 0: else no stage says how many bits are in use at first.")
        if max(self.active_bits) > self.bits:
            self.fail("active_bits", f"no stage may use more bits than bits = {self.bits}.")
        if self.sizes[0] != 1 or list(self.sizes) != sorted(set(self.sizes)):
            self.fail("sizes", "must ascend from 1: the first scale is always one cell.")
        if len(self.sizes) < 2:
            self.fail(
                "sizes",
                "needs a second size: a picture of several cells has two scales at least, and the last would share its "
                "scale embedding with the finished picture. Try [1, 2]",
            )
        if len(self.pixels) != len(self.pixel_shares) or any(side % (2 * self.patch) for side in self.pixels):
            self.fail("pixels", f"needs one share per side, each side a multiple of the stride {2 * self.patch}.")
        if sum(self.pixel_shares) <= 0:
            self.fail("pixel_shares", "are all zero, so no side is ever drawn. Give one of them a positive share")
        heads = max(1, self.channels // HEAD_CHANNELS)
        if self.decoder_attention and self.channels % heads:
            self.fail("channels", f"{self.channels} do not divide into the {heads} heads of decoder_attention. "
                      f"Use a multiple of {HEAD_CHANNELS}")
        if self.adversarial_weight and min(self.pixels) < SMALLEST_JUDGED:
            self.fail("pixels", f"of {min(self.pixels)} px are too small for the patch discriminator. Use "
                      f"{SMALLEST_JUDGED} px or more, or adversarial_weight 0")
        if self.video_frames % 4 != 1:
            self.fail("video_frames", "clips have 1+4n frames: one first frame, then groups of four.")


@config
class AudioTokenizerConfig(Config):
    """The audio codec, its quantiser and its losses (tokenizers/audio/README.md explains the choices).

    Stages run at hop, hop x factors[0], ... samples per position; the last stage is the codec's frame.
    """

    levels: int = field(8, doc="residual quantiser levels", check=positive, kind="architecture")
    codes: int = field(1024, doc="codes per level", check=positive, kind="architecture")
    code_width: int = field(48, doc="width of the latents that are quantised", check=positive, kind="architecture")
    sample_rate: int = field(
        SAMPLE_RATE, doc="sampling rate, that of all decoded sound", unit="Hz", kind="architecture"
    )
    hop: int = field(160, doc="distance of spectra", unit="samples", check=positive, kind="architecture")
    fft_size: int = field(640, doc="length of a spectrum's window", unit="samples", kind="architecture")
    mel_bands: int = field(80, doc="bands of the encoder's log-mel", check=positive, kind="architecture")
    factors: tuple[int, ...] = field(
        (2, 4), doc="positions joined between two stages of the encoder", check=positive, kind="architecture"
    )
    encoder_widths: tuple[int, ...] = field(
        (96, 144, 224), doc="width of each encoder stage, first at the hop", check=positive, kind="architecture"
    )
    encoder_depths: tuple[int, ...] = field(
        (1, 2, 2), doc="blocks of each encoder stage", check=non_negative, kind="architecture"
    )
    decoder_widths: tuple[int, ...] = field(
        (288, 192, 128), doc="width of each decoder stage, last at the hop", check=positive, kind="architecture"
    )
    decoder_depths: tuple[int, ...] = field(
        (2, 3, 2), doc="blocks of each decoder stage", check=non_negative, kind="architecture"
    )
    expansion: int = field(3, doc="inner width of a block over its width", check=positive, kind="architecture")

    batch_clips: int = field(8, doc="crops per step", check=positive)
    crop_frames: int = field(20, doc="codec frames of a crop", check=at_least(2))
    continuous_share: float = field(
        0.04, doc="share of the budget without quantisation, before k-means sets the codebooks", check=fraction
    )
    level_shares: tuple[float, ...] = field(
        (0.05, 0.05, 0.05, 0.35, 0.05, 0.05, 0.05, 0.35),
        doc="quantiser dropout: how often the first q levels are decoded, q = 1, 2, ...",
        check=fraction,
    )
    commitment_weight: float = field(0.25, doc="pull of the latents towards their codes", check=non_negative)
    semantic_weight: float = field(0.3, doc="distillation of level 1", check=non_negative)
    adversarial_from: float = field(0.4, doc="share of the budget after which the adversary plays", check=fraction)
    adversarial_weight: float = field(0.03, doc="hinge loss of the spectrum discriminators", check=non_negative)
    feature_weight: float = field(0.1, doc="distance of discriminator features", check=non_negative)
    adversarial_frames: int = field(10, doc="codec frames of a crop that the adversary sees", check=positive)
    validation_clips: int = field(32, doc="most validation clips per validation", check=positive)

    @property
    def samples_per_frame(self) -> int:
        """Samples of one codec frame: the hop times every factor."""
        return self.hop * math.prod(self.factors)

    def validate(self) -> None:
        if self.sample_rate != SAMPLE_RATE:
            self.fail(
                "sample_rate",
                f"{self.sample_rate} Hz is not what sound is decoded to. All sound becomes {SAMPLE_RATE} Hz first, so "
                f"that a codec of another rate would speak faster or slower: use {SAMPLE_RATE}",
            )
        stages = len(self.factors) + 1
        for key in ("encoder_widths", "encoder_depths", "decoder_widths", "decoder_depths"):
            if len(vars(self)[key]) != stages:
                self.fail(key, f"needs {stages} entries, one more than factors, one per stage.")
        if self.fft_size < self.hop or (self.fft_size - self.hop) % 2:
            self.fail("fft_size", f"must exceed hop = {self.hop} by an even number, so that frames can be centred.")
        if len(self.level_shares) != self.levels or sum(self.level_shares) <= 0:
            self.fail("level_shares", f"needs {self.levels} shares, one per level, not all zero.")
        if self.adversarial_frames > self.crop_frames:
            self.fail("adversarial_frames", f"cannot exceed crop_frames = {self.crop_frames}.")
        frame = self.samples_per_frame
        if frame % TEACHER_STEPS:
            self.fail("factors", f"make frames of {frame} samples with hop = {self.hop}; the teacher of level 1 takes "
                      f"{TEACHER_STEPS} equal steps in each. Choose a multiple of {TEACHER_STEPS} samples")
        if self.adversarial_weight and self.adversarial_frames * frame < JUDGED_SAMPLES:
            self.fail("adversarial_frames", f"of {frame} samples are too short to be judged. Use "
                      f"{-(-JUDGED_SAMPLES // frame)} or more, or adversarial_weight 0")


@config
class TextTokenizerConfig(Config):
    """The text vocabulary: byte-level BPE over UTF-16BE (SPEC section 2, Text)."""

    vocab_size: int = field(4096, doc="ids, the 256 bytes included", check=at_least(256), kind="architecture")
    min_frequency: int = field(2, doc="pairs rarer than this are never merged", check=positive, kind="architecture")
    language_balance: float = field(
        0.5,
        doc="a language of n characters is drawn with weight n^balance: 1 as found, 0 all alike",
        check=fraction,
        kind="architecture",
    )
    max_characters: int = field(
        20_000_000, doc="most characters drawn from the corpus", unit="characters", check=positive, kind="architecture"
    )


@config
class CodecTrainConfig(Config):
    """The training loop of a codec (train/codec.py)."""

    seed: int = field(1, doc="start of every random stream", kind="numerics")
    steps: int | None = field(None, doc="budget in optimizer steps; null: `minutes` decides", check=positive)
    minutes: float = field(60.0, doc="budget where `steps` is null", unit="minutes", check=positive)
    threads: int = field(0, doc="CPU threads; 0 leaves the setting of the process", check=non_negative)
    device: str = field("auto", doc="auto: a GPU where there is one (audio: the CPU)", choices=("auto", "cpu", "cuda"))
    precision: str = field(
        "bf16", doc="arithmetic of forward and backward; a CPU without bf16 products takes fp32", kind="numerics",
        choices=("fp32", "bf16"),
    )
    optimizer: str = field(
        "adamw", doc="adamw, or muon for maps between channels and adamw for the rest", choices=("adamw", "muon"),
        kind="numerics",
    )
    learning_rate: float = field(2e-3, doc="peak learning rate", check=positive, kind="numerics")
    final_rate: float = field(0.02, doc="last learning rate over the peak", check=fraction, kind="numerics")
    warmup_steps: int = field(200, doc="linear warm-up", check=non_negative, kind="numerics")
    beta2: float = field(0.99, doc="second-moment decay of AdamW", check=fraction, kind="numerics")
    weight_decay: float = field(0.01, doc="decoupled decay of matrices", check=non_negative, kind="numerics")
    clip_norm: float = field(1.0, doc="gradient norm above which steps are scaled down", check=positive)
    ema_decay: float = field(0.999, doc="decay of the averaged weights that are exported", check=fraction)
    log_every_steps: int = field(20, doc="distance of lines in curves.jsonl", check=positive, kind="logging")
    validate_every_steps: int = field(500, doc="distance of validations, exports and states", check=positive)


@config
class CodecDataConfig(Config):
    """What a tokenizer is trained on."""

    shards: tuple[str, ...] = field(
        ("sample",), doc="shard paths or globs, or `sample` for the embedded corpus", is_path=True
    )


@config
class TokenizerConfig(Config):
    """One tokenizer to be trained: `kind` says which of the three sections counts."""

    kind: str = field("visual", doc="which tokenizer", choices=("text", "visual", "audio"), kind="architecture")
    text: TextTokenizerConfig = field(TextTokenizerConfig, doc="used by kind text", kind="architecture")
    visual: VisualTokenizerConfig = field(VisualTokenizerConfig, doc="used by kind visual", kind="architecture")
    audio: AudioTokenizerConfig = field(AudioTokenizerConfig, doc="used by kind audio", kind="architecture")


@config
class TokenizerRunConfig(Config):
    """Root of a tokenizer-training YAML (`ernie5 tokenizer train`)."""

    tokenizer: TokenizerConfig = field(TokenizerConfig, doc="what is trained", kind="architecture")
    train: CodecTrainConfig = field(CodecTrainConfig, doc="how long and how")
    data: CodecDataConfig = field(CodecDataConfig, doc="from what")

    def validate(self) -> None:
        if self.train.device == "cuda" and self.tokenizer.kind != "visual":
            self.fail("train.device", f"cuda trains kind visual; set auto or cpu for {self.tokenizer.kind}.")
