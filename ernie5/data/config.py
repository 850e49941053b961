"""What is read, in which mixture, and how it is laid out in rows. Free of torch."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import REQUIRED, at_least, field, fraction, non_negative, positive
from ernie5.tokenizers.config import TokenizersConfig


@config
class MixtureConfig(Config):
    """Shares of the tokens of a run per task; any scale, 0 leaves a task out. Understanding reads media and writes
    text; generation reads text and writes media. The two directions of a medium are two tasks, each
    with epochs of its own."""

    text: float = field(4.0, doc="text documents", check=non_negative, kind="numerics")
    image_to_text: float = field(1.0, doc="describe a picture", check=non_negative, kind="numerics")
    text_to_image: float = field(2.0, doc="draw a picture", check=non_negative, kind="numerics")
    video_to_text: float = field(0.5, doc="describe a clip", check=non_negative, kind="numerics")
    text_to_video: float = field(1.0, doc="draw a clip", check=non_negative, kind="numerics")
    audio_to_text: float = field(0.75, doc="write down speech", check=non_negative, kind="numerics")
    text_to_audio: float = field(1.0, doc="speak", check=non_negative, kind="numerics")
    page: float = field(0.25, doc="pages of text and pictures", check=non_negative, kind="numerics")

    def validate(self) -> None:
        """Something must be left to train on."""
        if not any(vars(self)[name] for name in vars(self) if not name.startswith("_")):
            self.fail("text", "every share of the mixture is 0. Give at least one task a positive share")


@config
class RampStageConfig(Config):
    """Some of the first steps of a run, smaller than the later ones."""

    steps: int = field(REQUIRED, doc="length of the stage", unit="steps", check=positive, kind="numerics")
    global_sequences: int = field(
        REQUIRED, doc="rows that each of these steps sees, whatever the layout", unit="rows", check=positive,
        kind="numerics",
    )


@config
class PositionsConfig(Config):
    """Uni-RoPE positions (SPEC section 1)."""

    visual_origin: str = field(
        "running",
        doc="where h and w of a picture start: running = at the running position plus one, zero = at 0",
        choices=("running", "zero"),
        kind="architecture",
    )


@config
class CorruptionConfig(Config):
    """Bit flips in the history of drawn pictures, re-quantised (SPEC section 2): per scale
    p ~ U(frame_slope * t, high + frame_slope * t), clamped; t is the latent frame."""

    enabled: bool = field(True, doc="corrupt the history of pictures and clips in training", kind="numerics")
    high: float = field(0.25, doc="largest flip probability in the first frame", check=fraction, kind="numerics")
    frame_slope: float = field(0.01, doc="growth of both bounds per latent frame", check=fraction, kind="numerics")
    clamp: float = field(0.5, doc="flip probability that is never exceeded", check=fraction, kind="numerics")


@config
class VideoAttentionConfig(Config):
    """What later frames of a clip to be drawn see of earlier ones (SPEC section 2)."""

    window_frames: int = field(
        0,
        doc="latent frames that a frame sees, itself included; 0 sees all",
        unit="frames",
        check=non_negative,
        kind="numerics",
    )
    mask_probability: float = field(
        0.0, doc="chance that a past frame is hidden from all later ones", check=fraction, kind="numerics"
    )


@config
class DataConfig(Config):
    """The stream of batches."""

    shards: tuple[str, ...] = field(
        ("sample",), doc="shard paths or globs, or `sample` for the embedded corpus", is_path=True
    )
    sequence_tokens: int = field(512, doc="length of a packed row", unit="tokens", check=at_least(2), kind="numerics")
    streams: int = field(
        4,
        doc="logical streams, each packing its own rows; a multiple of every dp used",
        check=positive,
        kind="numerics",
    )
    workers: int = field(0, doc="threads that prepare rows ahead; 0 prepares them inline", check=non_negative)
    prefetch_steps: int = field(2, doc="steps that the workers together prepare ahead", unit="steps", check=positive)
    mixture: MixtureConfig = field(MixtureConfig, doc="shares of the tasks", kind="numerics")
    text_tokens: int = field(
        0,
        doc="most tokens of one part of a text; the rest follows as parts that do not see it; 0 fills rows",
        unit="tokens",
        check=non_negative,
        kind="numerics",
    )
    pack_window: int = field(
        8, doc="media documents that may wait for a row with room", unit="documents", check=positive, kind="numerics"
    )
    image_pixels: int = field(64, doc="side of pictures", unit="px", check=positive, kind="architecture")
    video_pixels: int = field(32, doc="side of clips", unit="px", check=positive, kind="architecture")
    video_frames: int = field(17, doc="frames of a clip, 1+4n", unit="frames", check=positive, kind="architecture")
    positions: PositionsConfig = field(PositionsConfig, doc="positions of visual cells", kind="architecture")
    bpe_dropout: float = field(
        0.1, doc="chance that a BPE merge is skipped in training", check=fraction, kind="numerics"
    )
    condition_drop: float = field(
        0.1, doc="chance that the text before a generated medium is left out", check=fraction, kind="numerics"
    )
    caption_languages: tuple[str, ...] = field(
        ("en",), doc="languages of captions that are used; empty uses all", kind="numerics"
    )
    first_language_share: float = field(
        0.7, doc="how often the first of caption_languages is taken where several fit", check=fraction, kind="numerics"
    )
    corruption: CorruptionConfig = field(CorruptionConfig, doc="corrupted history of pictures", kind="numerics")
    video_attention: VideoAttentionConfig = field(VideoAttentionConfig, doc="masks of past frames", kind="numerics")
    cache_megabytes: int = field(
        512, doc="memory for frozen tokenizer features, which are then computed once", unit="MB", check=non_negative
    )
    feature_cache: str = field(
        "user",
        doc="folder on disk where processes and runs share those features: a path, `user` for "
        "$XDG_CACHE_HOME/ernie5/features (~/.cache), or `none`",
        kind="performance",
        is_path=True,
    )
    feature_cache_megabytes: int = field(
        2048, doc="room in that folder; when it is full nothing is added", unit="MB", check=non_negative,
        kind="performance",
    )

    def validate(self) -> None:
        """There is something to read, and clips inflate from one frame."""
        if not self.shards:
            self.fail("shards", "no shard is named. Give paths or globs, or [sample] for the embedded corpus")
        if self.video_frames % 4 != 1:
            self.fail("video_frames", "clips have 1+4n frames: one first frame, then groups of four. Try 17")


@config
class BuildSections(Config):
    """The sections of a training config that `ernie5 data build` measures samples by."""

    data: DataConfig = field(DataConfig, doc="rows, sizes of media, languages, shares of the tasks")
    tokenizers: TokenizersConfig = field(TokenizersConfig, doc="what media and words take")
