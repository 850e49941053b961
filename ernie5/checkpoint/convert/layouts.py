"""How each format stores the text model: which tensors there are, and of which pieces each is made.

All formats hold the same *pieces*: the unfused matrices `[out, in]` and vectors of ERNIE 4.5, called by their names on
the hub. A stored tensor is the concatenation of its pieces along their first dim, read as its own shape (experts
stacked, gate over up), and, where `transposed`, written as `[in, out]`. Converting is then copying pieces, one by one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from ernie5.model.config import ModelConfig

FP32_PIECES = re.compile(r"\.mlp\.gate\.weight$|e_score_correction_bias$")
BIAS = "mlp.moe_statics.e_score_correction_bias"


@dataclasses.dataclass(frozen=True)
class Piece:
    """An unfused tensor by its name on the hub; shape [out, in], [out], or [1, E] for the balance bias."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def needs_fp32(self) -> bool:
        """Whether ERNIE 4.5 keeps this piece in fp32 whatever the rest: routers and their bias."""
        return bool(FP32_PIECES.search(self.name))


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a format: `pieces` one after the other along the first dim; shape as in the file."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transposed: bool = False


def own_layout(model: ModelConfig) -> tuple[Stored, ...]:
    """The text part of `UnifiedModel`, in the order of its modules; media embeddings and heads have no pieces."""
    embedding = Piece("model.embed_tokens.weight", (model.vocab_size, model.width))
    stored = [Stored("embedding.text.weight", embedding.shape, (embedding,))]
    for layer in range(model.layers):
        own, hub = f"layers.{layer}", f"model.layers.{layer}"
        stored += _attention(model, own=own, hub=hub)
        if layer < model.dense_layers:
            stored += _feed_forward(model.width, hidden=model.dense_width, own=f"{own}.mlp", hub=f"{hub}.mlp")
        else:
            stored += _experts(model, own=f"{own}.moe", hub=f"{hub}.mlp")
    stored.append(_single("final_norm.weight", "model.norm.weight", (model.width,)))
    if not model.tie_embeddings:
        stored.append(_single("text_head.weight", "lm_head.weight", embedding.shape))
    for depth in range(model.mtp.depth):
        stored += _mtp(model, depth=depth)
    return tuple(stored)


def _single(own: str, hub: str, shape: tuple[int, ...]) -> Stored:
    return Stored(own, shape, (Piece(hub, shape),))


def _attention(model: ModelConfig, *, own: str, hub: str) -> Iterator[Stored]:
    width, query, key = model.width, model.query_heads * model.head_width, model.kv_heads * model.head_width
    yield _single(f"{own}.attention_norm.weight", f"{hub}.input_layernorm.weight", (width,))
    for ours, theirs, shape in (
        ("query", "q", (query, width)), ("key", "k", (key, width)), ("value", "v", (key, width)),
        ("output", "o", (width, query)),
    ):
        yield _single(f"{own}.attention.{ours}.weight", f"{hub}.self_attn.{theirs}_proj.weight", shape)
    if model.qk_norm:  # no ERNIE 4.5 has them; they travel between formats of ours
        for ours in ("query", "key"):
            yield _single(f"{own}.attention.{ours}_norm.weight", f"{hub}.self_attn.{ours}_norm", (model.head_width,))
    yield _single(f"{own}.mlp_norm.weight", f"{hub}.post_attention_layernorm.weight", (width,))


def _feed_forward(width: int, *, hidden: int, own: str, hub: str) -> Iterator[Stored]:
    pair = tuple(Piece(f"{hub}.{part}_proj.weight", (hidden, width)) for part in ("gate", "up"))
    yield Stored(f"{own}.gate_up.weight", (2 * hidden, width), pair)
    yield _single(f"{own}.down.weight", f"{hub}.down_proj.weight", (width, hidden))


def _experts(model: ModelConfig, *, own: str, hub: str) -> Iterator[Stored]:
    width, moe = model.width, model.moe
    count, hidden = moe.num_experts, moe.expert_width
    yield _single(f"{own}.router.weight", f"{hub}.gate.weight", (count, width))
    yield Stored(f"{own}.router.balance_bias", (count,), (Piece(f"{hub}.moe_statics.e_score_correction_bias",
                                                              (1, count)),))
    names = [f"{hub}.experts.{expert}" for expert in range(count)]
    pairs = tuple(Piece(f"{n}.{part}_proj.weight", (hidden, width)) for n in names for part in ("gate", "up"))
    downs = tuple(Piece(f"{n}.down_proj.weight", (width, hidden)) for n in names)
    yield Stored(f"{own}.experts.gate_up", (count, 2 * hidden, width), pairs)
    yield Stored(f"{own}.experts.down", (count, width, hidden), downs)
    if moe.shared_experts:
        yield from _feed_forward(
            width, hidden=moe.shared_experts * hidden, own=f"{own}.shared", hub=f"{hub}.shared_experts"
        )


def _mtp(model: ModelConfig, *, depth: int) -> Iterator[Stored]:
    own, width = f"mtp.{depth}", model.width
    yield _single(f"{own}.embedding_norm.weight", f"model.mtp_emb_norm.{depth}.weight", (width,))
    yield _single(f"{own}.hidden_norm.weight", f"model.mtp_hidden_norm.{depth}.weight", (width,))
    yield _single(f"{own}.project.weight", f"model.mtp_linear_proj.{depth}.weight", (width, 2 * width))
    block, hub = f"{own}.block", f"model.mtp_block.{depth}"
    yield from _attention(model, own=block, hub=hub)
    yield from _feed_forward(width, hidden=model.dense_width, own=f"{block}.mlp", hub=f"{hub}.mlp")


def hub_layout(model: ModelConfig) -> tuple[Stored, ...]:
    """What `save_pretrained` of transformers and the hub hold: every piece a tensor of its own."""
    return tuple(Stored(p.name, p.shape, (p,)) for stored in own_layout(model) for p in stored.pieces)


def memory_layout(model: ModelConfig) -> tuple[Stored, ...]:
    """The parameters of transformers >= 5 in memory: experts stacked, the balance bias inside the gate."""
    result: list[Stored] = []
    for stored in own_layout(model):
        first = stored.pieces[0].name
        stack = re.fullmatch(r"(.*\.experts)\.0\.(gate|down)_proj\.weight", first)
        if stack:
            part = "gate_up_proj" if stack[2] == "gate" else "down_proj"
            result.append(dataclasses.replace(stored, name=f"{stack[1]}.{part}"))
        elif first.endswith(BIAS):
            name = first.replace("mlp.moe_statics", "mlp.gate.moe_statics")
            result.append(Stored(name, stored.pieces[0].shape, stored.pieces))
        else:
            result += [Stored(p.name, p.shape, (p,)) for p in stored.pieces]
    return tuple(result)


def paddle_layout(model: ModelConfig) -> tuple[Stored, ...]:
    """Paddle's: prefix `ernie.`, products as `[in, out]`, query, key and value fused, gate and up fused."""
    pieces = [p for stored in own_layout(model) for p in stored.pieces]
    result: list[Stored] = []
    while pieces:
        first = pieces.pop(0)
        fused = (first,)
        name = re.sub(r"^model\.", "ernie.", first.name)
        if name.endswith(".q_proj.weight"):
            fused, name = (first, pieces.pop(0), pieces.pop(0)), name.replace("q_proj", "qkv_proj")
        elif name.endswith(".gate_proj.weight"):
            fused, name = (first, pieces.pop(0)), name.replace("gate_proj", "up_gate_proj")
        out = sum(p.shape[0] for p in fused)
        is_product = len(first.shape) == 2 and not name.endswith(("embed_tokens.weight", "e_score_correction_bias"))
        shape = (first.shape[1], out) if is_product else first.shape
        result.append(Stored(name, shape, fused, transposed=is_product))
    return tuple(result)


def vl_hub_layout(model: ModelConfig) -> tuple[Stored, ...]:
    """The text part of Ernie4_5_VLMoe on the hub: gates as `[D, E]`, bias rows text and vision, text experts first."""
    result: list[Stored] = []
    for stored in hub_layout(model):
        piece = stored.pieces[0]
        if piece.name.endswith(".mlp.gate.weight"):
            stored = Stored(piece.name, (piece.shape[1], piece.shape[0]), (piece,), transposed=True)
        elif piece.name.endswith(BIAS):
            vision = Piece(f"{piece.name} (vision)", piece.shape)
            stored = Stored(piece.name, (2, piece.shape[1]), (piece, vision))
        result.append(stored)
    return tuple(result)


def vl_memory_layout(model: ModelConfig) -> tuple[Stored, ...]:
    """The same in memory of transformers >= 5: `model.language_model.`, and `text_moe` around gate and experts."""
    result = []
    for stored in memory_layout(model):
        name = re.sub(r"^model\.", "model.language_model.", stored.name)
        name = re.sub(r"\.mlp\.(gate\.|experts\.)", r".mlp.text_moe.\1", name)
        result.append(dataclasses.replace(stored, name=name))
    return tuple(result)


# Tensors of Ernie4_5_VLMoe that are no part of its text model; {experts} stands for the number of text experts.
VL_LEFT_OUT = re.compile(
    r"^(model\.)?(vision_model|vision_tower|resampler_model)\.|\.mlp\.gate\.weight_1$|\.mlp\.vision_moe\."
)
VL_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def is_vision(name: str, *, num_experts: int) -> bool:
    """Whether a tensor of Ernie4_5_VLMoe belongs to its vision part: experts from `num_experts` on do."""
    expert = VL_EXPERT.search(name)
    return bool(VL_LEFT_OUT.search(name)) or (expert is not None and int(expert[1]) >= num_experts)
