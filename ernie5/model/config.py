"""Shape of the model as configuration, and its parameter and FLOP counts. Torch-free (DESIGN section 1.6).

Every default is SPEC section 1's; the counts are exact and tested against the built module, name by name.
"""

from __future__ import annotations

import dataclasses

from ernie5.config.base import Config, config
from ernie5.config.field import field, non_negative, positive

MODALITIES = ("text", "image", "video", "audio")


def _even(value: int) -> str | None:
    return None if value > 0 and value % 2 == 0 else "must be a positive even number"


@config
class BalanceConfig(Config):
    """Auxiliary-loss-free balance (SPEC section 1) and the optional auxiliary losses, whose weights are objectives'."""

    speed: float | None = field(
        None, doc="step u of the bias update; null means max(1e-4, 0.3 / train.steps); 0 switches it off",
        check=non_negative, kind="numerics",
    )
    switch_loss: bool = field(False, doc="compute the switch loss E * sum f_e P_e of a micro-batch", kind="numerics")
    sequence_loss: bool = field(False, doc="compute the same loss per row, then averaged", kind="numerics")
    z_loss: bool = field(False, doc="compute the router z-loss mean(logsumexp(logits)^2)", kind="numerics")

    @property
    def needs_scores(self) -> bool:
        """Whether a loss reads the scores of all experts, not of the chosen ones alone."""
        return self.switch_loss or self.sequence_loss or self.z_loss


@config
class MoEConfig(Config):
    """One pool of routed experts per layer, and the router's arithmetic."""

    num_experts: int = field(64, doc="routed experts per layer", check=positive, kind="architecture")
    top_k: int = field(4, doc="experts per token", check=positive, kind="architecture")
    expert_width: int = field(128, doc="SwiGLU width of one expert", check=positive, kind="architecture")
    shared_experts: int = field(
        0, doc="always-on experts, fused into one SwiGLU of this many widths", check=non_negative, kind="architecture"
    )
    score: str = field(
        "sigmoid", doc="router score; softmax is ERNIE 4.5's", choices=("sigmoid", "softmax"), kind="architecture"
    )
    num_groups: int = field(
        1, doc="groups of consecutive experts for node-limited routing; 1: none", check=positive, kind="architecture"
    )
    top_groups: int = field(
        1, doc="groups per token, the best by the sum of their highest top_k / top_groups scores", check=positive,
        kind="architecture",
    )
    scale: float = field(1.0, doc="factor on the renormalised combine weights", check=positive, kind="architecture")
    balance: BalanceConfig = field(BalanceConfig(), doc="how the load is kept even")

    def validate(self) -> None:
        if self.top_k > self.num_experts:
            self.fail(
                "top_k",
                f"{self.top_k} exceeds num_experts = {self.num_experts}. Choices are distinct: choose at most "
                f"{self.num_experts}, or raise num_experts",
            )
        self._check_groups()

    @property
    def is_group_limited(self) -> bool:
        """Whether a token may not choose from all groups."""
        return self.top_groups < self.num_groups

    def _check_groups(self) -> None:
        """Node-limited routing: whole groups, and an equal share of the choices in each of a token's groups."""
        if self.num_experts % self.num_groups:
            self.fail(
                "num_groups",
                f"{self.num_groups} does not divide num_experts = {self.num_experts}. Every group holds the same "
                "number of experts: choose a divisor, or 1 for none",
            )
        if self.top_groups > self.num_groups:
            self.fail(
                "top_groups",
                f"{self.top_groups} exceeds num_groups = {self.num_groups}. Groups are distinct: choose at most "
                f"{self.num_groups}, where all may be chosen from",
            )
        if not self.is_group_limited:
            return
        if self.top_k % self.top_groups:
            self.fail(
                "top_groups",
                f"{self.top_groups} does not divide top_k = {self.top_k}. A group is ranked by its highest top_k / "
                "top_groups scores: choose a divisor of top_k",
            )
        offered = self.top_groups * (self.num_experts // self.num_groups)
        if offered < self.top_k:
            self.fail(
                "top_groups",
                f"{self.top_groups} groups hold {offered} experts, fewer than top_k = {self.top_k}. Raise top_groups, "
                "or make fewer, larger groups",
            )


@config
class MTPConfig(Config):
    """Multi-token prediction modules (SPEC section 1)."""

    depth: int = field(1, doc="modules; module d predicts token t+d+2", check=non_negative, kind="architecture")


@config
class VisualModelConfig(Config):
    """Visual inputs and outputs of the backbone; the first four values must equal the visual tokenizer's."""

    bits: int = field(16, doc="latent channels d = bits per cell", check=positive, kind="architecture")
    num_scales: int = field(6, doc="scales S of the largest grid's schedule", check=positive, kind="architecture")
    patch_pixels: int = field(8, doc="side of a ViT patch, the tokenizer's stride", unit="px", check=positive,
                              kind="architecture")
    encoder_channels: int = field(128, doc="channels A of the tokenizer's encoder output", check=positive,
                                  kind="architecture")
    vit_width: int = field(128, doc="width of the ViT and of the patch merger", check=positive, kind="architecture")
    vit_layers: int = field(2, doc="ViT layers", check=non_negative, kind="architecture")
    vit_heads: int = field(4, doc="heads of the ViT and of the patch merger", check=positive, kind="architecture")
    image_merge: int = field(4, doc="patches K per position of an image", check=positive, kind="architecture")
    video_merge: int = field(16, doc="patches K per position of a clip, over 4 frames", check=positive,
                             kind="architecture")

    def validate(self) -> None:
        if self.vit_width % (4 * self.vit_heads):
            self.fail("vit_heads", f"{self.vit_heads} heads over width {self.vit_width}: a head's width must be a "
                      "multiple of 4, half of its frequency pairs turn with y and half with x")


@config
class AudioModelConfig(Config):
    """Audio inputs and outputs of the backbone; the model uses the first `levels` of the tokenizer's levels."""

    levels: int = field(4, doc="codec levels Q", check=positive, kind="architecture")
    codes: int = field(1024, doc="codes C per level, the end code not counted", check=positive, kind="architecture")
    speaker_features: int = field(160, doc="length of the speaker embedding", check=positive, kind="architecture")


@config
class ModelConfig(Config):
    """The unified model of SPEC section 1."""

    layers: int = field(6, doc="decoder layers L", check=positive, kind="architecture")
    width: int = field(256, doc="residual width D", check=positive, kind="architecture")
    query_heads: int = field(4, doc="query heads", check=positive, kind="architecture")
    kv_heads: int = field(2, doc="key and value heads", check=positive, kind="architecture")
    head_width: int = field(64, doc="width C of a head; frequencies split over (h, w, t)", check=_even,
                            kind="architecture")
    vocab_size: int = field(4224, doc="rows of the text embedding and head (vocab.size_head)", check=positive,
                            kind="architecture")
    rope_base: float = field(1e6, doc="base of the rotary frequencies", check=positive, kind="architecture")
    norm_eps: float = field(1e-5, doc="epsilon of every RMSNorm", check=positive, kind="architecture")
    qk_norm: bool = field(True, doc="RMSNorm on queries and keys before rotation", kind="architecture")
    tie_embeddings: bool = field(True, doc="text head = text embedding", kind="architecture")
    dense_layers: int = field(0, doc="leading layers with a dense SwiGLU instead of experts", check=non_negative,
                              kind="architecture")
    dense_width: int = field(1024, doc="SwiGLU width of dense layers and of MTP blocks", check=positive,
                             kind="architecture")
    modalities: tuple[str, ...] = field(MODALITIES, doc="modalities that get embeddings and heads",
                                        choices=MODALITIES, kind="architecture")
    attention_backend: str = field(
        "auto", doc="attention kernel; sdpa and flex are PyTorch's own, flex cannot train on a CPU",
        choices=("auto", "native", "torch", "triton", "sdpa", "flex", "flash_attn", "reference"), kind="performance",
    )
    expert_backend: str = field(
        "auto", doc="kernels of the expert layer: router, order of rows, products; *_fp8 multiply in e4m3",
        choices=("auto", "native", "torch", "triton", "triton_fp8", "deepgemm_fp8", "megablocks", "reference"),
        kind="performance",
    )
    moe: MoEConfig = field(MoEConfig(), doc="experts and router")
    mtp: MTPConfig = field(MTPConfig(), doc="multi-token prediction")
    visual: VisualModelConfig = field(VisualModelConfig(), doc="visual inputs and outputs")
    audio: AudioModelConfig = field(AudioModelConfig(), doc="audio inputs and outputs")

    def validate(self) -> None:
        if self.query_heads % self.kv_heads:
            self.fail("kv_heads", f"{self.kv_heads} does not divide query_heads = {self.query_heads}. Each key head "
                      "serves an equal number of query heads")
        if "text" not in self.modalities:
            self.fail("modalities", "text is missing. Every document starts with a text token")
        if self.dense_layers > self.layers:
            self.fail("dense_layers", f"{self.dense_layers} exceeds layers = {self.layers}")
        if self.has_audio and self.layers < self.audio.levels + 1:
            self.fail("layers", f"{self.layers} is too few for audio.levels = {self.audio.levels}. Level q is read "
                      f"from layer L-Q+q, so layers must be at least {self.audio.levels + 1}, or audio.levels fewer")

    @property
    def has_visual(self) -> bool:
        """Whether visual embeddings and heads exist."""
        return "image" in self.modalities or "video" in self.modalities

    @property
    def has_audio(self) -> bool:
        """Whether audio embeddings and heads exist."""
        return "audio" in self.modalities

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(range(self.dense_layers, self.layers))


@dataclasses.dataclass(frozen=True)
class ParamCounts:
    """Numbers of parameters by part; the balance biases are buffers and do not count."""

    embedding: int
    head: int
    attention: int
    dense: int
    routers: int
    experts: int
    shared_experts: int
    norms: int
    mtp: int
    visual: int
    audio: int

    @property
    def total(self) -> int:
        """Sum over the parts."""
        return sum(dataclasses.astuple(self))


def attention_params(config: ModelConfig) -> int:
    """Weights of one attention, QK-norms included, the pre-norm not."""
    heads = 2 * config.query_heads + 2 * config.kv_heads
    return config.width * config.head_width * heads + (2 * config.head_width if config.qk_norm else 0)


def _swiglu_params(width: int, *, hidden: int) -> int:
    return 3 * width * hidden


def _mtp_params(config: ModelConfig) -> int:
    block = attention_params(config) + _swiglu_params(config.width, hidden=config.dense_width) + 2 * config.width
    return config.mtp.depth * (block + 2 * config.width + 2 * config.width * config.width)


def _visual_params(config: ModelConfig) -> int:
    if not config.has_visual:
        return 0
    v, width = config.visual, config.visual.vit_width
    vit_layer = 4 * width * width + _swiglu_params(width, hidden=vit_hidden(v)) + 2 * width
    vit = 3 * v.patch_pixels**2 * width + v.vit_layers * vit_layer + width
    shared = v.encoder_channels * width
    patches = v.image_merge + v.video_merge
    merge = 2 * patches * width + 2 * (4 * width * width + width + width * config.width + config.width)
    generation = 2 * v.bits * config.width + (v.num_scales + 1) * config.width
    return vit + shared + merge + generation


def _audio_params(config: ModelConfig) -> int:
    if not config.has_audio:
        return 0
    a, width = config.audio, config.width
    tables = a.levels * a.codes * width + (a.levels - 1) * (a.codes + 1) * width
    heads = a.levels * ((a.codes + 1) * width + width)
    return tables + heads + a.speaker_features * width + width


def vit_hidden(config: VisualModelConfig) -> int:
    """SwiGLU width of a ViT layer: 8/3 of the width, rounded up to a multiple of 16."""
    return -(-8 * config.vit_width // (3 * 16)) * 16


def param_counts(config: ModelConfig) -> ParamCounts:
    """Exact number of parameters of every part of the built model."""
    sparse, width = len(config.moe_layers), config.width
    expert = _swiglu_params(width, hidden=config.moe.expert_width)
    return ParamCounts(
        embedding=config.vocab_size * width,
        head=0 if config.tie_embeddings else config.vocab_size * width,
        attention=config.layers * attention_params(config),
        dense=config.dense_layers * _swiglu_params(width, hidden=config.dense_width),
        routers=sparse * config.moe.num_experts * width,
        experts=sparse * config.moe.num_experts * expert,
        shared_experts=sparse * config.moe.shared_experts * expert,
        norms=(2 * config.layers + 1) * width,
        mtp=_mtp_params(config),
        visual=_visual_params(config),
        audio=_audio_params(config),
    )


def num_params(config: ModelConfig, *, with_mtp: bool = True) -> int:
    """Exact number of parameters; `with_mtp=False` leaves out the MTP modules, which serving does not need."""
    counts = param_counts(config)
    return counts.total - (0 if with_mtp else counts.mtp)


def num_active_params(config: ModelConfig) -> int:
    """Weights that one text token multiplies with: head included, embedding look-up and MTP excluded."""
    counts, moe = param_counts(config), config.moe
    chosen = counts.experts // moe.num_experts * moe.top_k
    return (
        config.vocab_size * config.width + counts.attention + counts.dense + counts.routers + counts.shared_experts
        + counts.norms + chosen
    )


def flops_per_token(config: ModelConfig, *, sequence_tokens: int) -> float:
    """Training FLOPs of one text token: three times forward, MTP modules (head included) and attention included.

    Forward costs two per active weight, and 4 * query_heads * head_width per visible key and layer; a causal row of
    `sequence_tokens` shows (sequence_tokens + 1) / 2 keys on average (no credit is taken for the masked half).
    """
    depth = config.mtp.depth
    weights = num_active_params(config) + _mtp_params(config) + depth * config.vocab_size * config.width
    keys = (sequence_tokens + 1) / 2
    attention = 4 * config.query_heads * config.head_width * keys * (config.layers + depth)
    return 3.0 * (2.0 * weights + attention)
