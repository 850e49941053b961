"""Configurations of the kernels that move data more than they compute."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from cases import (
    BITS,
    BITS_CELLS,
    EXPERT_WIDTH,
    EXPERTS,
    HEAD_WIDTH,
    LOCAL_EXPERTS,
    QUERY_HEADS,
    ROWS,
    TOKENS,
    TOP_K,
    WIDTH,
    Case,
    Work,
    streaming,
)
from compiler import Source
from triton.language import bfloat16, float32

from ernie5_kernels.adamw import kernel as adamw
from ernie5_kernels.adamw_compact import kernel as compact
from ernie5_kernels.adamw_compact.reference import BLOCK
from ernie5_kernels.bit_cross_entropy import kernel as bits
from ernie5_kernels.moe_permute import kernel as permute
from ernie5_kernels.quant_cast import kernel as cast
from ernie5_kernels.rms_norm import kernel as norm
from ernie5_kernels.rope3d import kernel as rope
from ernie5_kernels.router_topk import kernel as router
from ernie5_kernels.swiglu import kernel as swiglu

FP8_CHIPS = (90, 100)
WIDE = {"rows": "i32", "width": "i32"}
ADAMW_TYPES = {
    "table": "*i64", "keeps": "*fp32", "chunk_tensors": "*i32", "chunk_starts": "*i64", "scale": "*fp32",
    **dict.fromkeys(("rate", "blend1", "beta2", "blend2", "epsilon", "root"), "fp32"),
}
PARAMETERS = 3 * LOCAL_EXPERTS * EXPERT_WIDTH * WIDTH


def cases() -> Iterator[Case]:
    """SwiGLU, RMSNorm, rotation, routing, permutation, casts, bits, both kinds of AdamW."""
    yield from _swiglu()
    yield from _norm_and_rotation()
    yield from _routing()
    yield from _permutation()
    yield from _casts()
    yield from _bits_and_adamw()
    yield from _compact()


def _case(
    op: str, variant: str, kernel: object, types: Mapping[str, str], constants: Mapping[str, object], *, warps: int,
    work: Work, divisible: tuple[str, ...] = ("width",), capabilities: tuple[int, ...] = (80, 90, 100),
    quick: bool = False,
) -> Case:
    source = Source(kernel, types, constants, divisible, warps, 3)
    return Case(op, variant, lambda _: source, lambda _: work, capabilities, quick=quick)


def _swiglu() -> Iterator[Case]:
    elements = ROWS * EXPERT_WIDTH * 2
    types = {"gate_up": "*bf16", "row_weights": "*fp32", "out": "*bf16", **WIDE}
    constants = {"WEIGHTED": True, "BLOCK_ROWS": swiglu.FORWARD_ROWS, "BLOCK_WIDTH": swiglu.FORWARD_WIDTH}
    tiles = ROWS / swiglu.FORWARD_ROWS * EXPERT_WIDTH / swiglu.FORWARD_WIDTH
    yield _case("swiglu", "forward", swiglu.swiglu_forward_kernel, types, constants, warps=swiglu.WARPS,
                work=streaming(moved=3 * elements + 4 * ROWS, tiles=tiles), quick=True)
    types = {"gate_up": "*bf16", "row_weights": "*fp32", "grad": "*bf16", "grad_gate_up": "*bf16",
             "grad_weights": "*fp32", **WIDE}
    constants = {"WEIGHTED": True, "BLOCK_WIDTH": swiglu.BACKWARD_WIDTH}
    yield _case("swiglu", "backward", swiglu.swiglu_backward_kernel, types, constants, warps=swiglu.WARPS,
                work=streaming(moved=5 * elements + 8 * ROWS, tiles=ROWS))


def _norm_and_rotation() -> Iterator[Case]:
    rows, width, warps = norm.blocks_of(WIDTH)
    constants, elements = {"BLOCK_ROWS": rows, "BLOCK_WIDTH": width}, TOKENS * WIDTH * 2
    types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "inverse": "*fp32", "eps": "fp32", **WIDE}
    yield _case("rms_norm", "forward", norm.rms_norm_forward_kernel, types, constants, warps=warps,
                work=streaming(moved=2 * elements + 4 * TOKENS + 2 * WIDTH, tiles=TOKENS / rows), quick=True)
    types = {"x": "*bf16", "weight": "*bf16", "inverse": "*fp32", "grad": "*bf16", "grad_x": "*bf16",
             "partial": "*fp32", **WIDE}
    least = 3 * elements + 4 * TOKENS + 4 * WIDTH
    partial = 2 * 148 * norm.PROGRAMS_PER_PROCESSOR * WIDTH * 4  # written and read once, 148 processors at most
    yield _case("rms_norm", "backward", norm.rms_norm_backward_kernel, types, constants, warps=warps,
                work=streaming(moved=least + partial, least=least, tiles=TOKENS / rows))
    pairs = HEAD_WIDTH // 2
    types = {"x": "*bf16", "rotation": "*fp32", "out": "*bf16", "tokens": "i32", "heads": "i32", "pairs": "i32",
             "stride_row": "i64", "stride_token": "i32", "stride_head": "i32", "row_tokens": "i32", "sign": "fp32"}
    block = rope.TILE_ELEMENTS // (2 * pairs)
    moved = 2 * TOKENS * QUERY_HEADS * HEAD_WIDTH * 2 + TOKENS * HEAD_WIDTH * 4
    yield _case("rope3d", "both ways", rope.rope3d_kernel, types, {"BLOCK_TOKENS": block, "BLOCK_PAIRS": pairs},
                warps=rope.WARPS, divisible=("pairs", "stride_row", "stride_token", "stride_head"),
                work=streaming(moved=moved, tiles=TOKENS / block))


def _routing() -> Iterator[Case]:
    tokens, experts = router.blocks_of(EXPERTS)
    blocks = {"BLOCK_TOKENS": tokens, "BLOCK_EXPERTS": experts}
    types = {"logits": "*fp32", "bias": "*fp32", "active": "*i1", "choices": "*i64", "weights": "*fp32",
             "scores": "*fp32", "counts": "*i64", "tokens": "i32", "experts": "i32", "scale": "fp32",
             "smallest": "fp32"}
    grid, chosen = TOKENS * EXPERTS * 4, TOKENS * TOP_K
    yield _case("router_topk", "forward", router.router_topk_kernel, types,
                {"TOP_K": TOP_K, "SIGMOID": True, "RESTRICTED": False, **blocks}, warps=router.WARPS,
                divisible=("experts",), work=streaming(moved=2 * grid + 12 * chosen, tiles=TOKENS / tokens))
    types = {"scores": "*fp32", "choices": "*i64", "grad_weights": "*fp32", "grad_scores": "*fp32",
             "grad_logits": "*fp32", "tokens": "i32", "experts": "i32", "scale": "fp32", "smallest": "fp32"}
    yield _case("router_topk", "backward", router.router_backward_kernel, types,
                {"TOP_K": TOP_K, "SIGMOID": True, "SCORED": True, **blocks}, warps=router.WARPS, divisible=("experts",),
                work=streaming(moved=3 * grid + 12 * chosen, tiles=TOKENS / tokens))


def _permutation() -> Iterator[Case]:
    counts = {"choices": "*i64", "counts": "*i32", "slots": "i32", "experts": "i32"}
    blocks = ROWS / permute.BLOCK_SLOTS
    table = blocks * EXPERTS
    yield _case("moe_permute", "count", permute.count_kernel, counts, {"BLOCK": permute.BLOCK_SLOTS,
                "BLOCK_EXPERTS": 512}, warps=4, divisible=("experts",),
                work=streaming(moved=8 * ROWS + 4 * table, tiles=blocks))
    places = {"choices": "*i64", "firsts": "*i64", "sources": "*i64", "places": "*i64", "slots": "i32",
              "experts": "i32", "top_k": "i32"}
    yield _case("moe_permute", "place", permute.place_kernel, places, {"BLOCK": permute.BLOCK_SLOTS}, warps=4,
                divisible=("experts",), work=streaming(moved=24 * ROWS + 8 * table, tiles=blocks))
    spread, packed = ROWS * WIDTH * 2, TOKENS * WIDTH * 2
    types = {"x": "*bf16", "places": "*i64", "rows_out": "*bf16", "width": "i32"}
    yield _case("moe_permute", "permute", permute.permute_kernel, types,
                {"TOP_K": TOP_K, "BLOCK_WIDTH": permute.COPY_WIDTH}, warps=4,
                work=streaming(moved=spread + packed + 8 * ROWS, tiles=TOKENS * WIDTH / permute.COPY_WIDTH))
    types = {"rows": "*bf16", "places": "*i64", "weights": "*fp32", "out": "*bf16", "width": "i32"}
    yield _case("moe_permute", "unpermute", permute.unpermute_kernel, types,
                {"TOP_K": TOP_K, "WEIGHTED": True, "BLOCK_WIDTH": permute.COPY_WIDTH}, warps=4,
                work=streaming(moved=spread + packed + 12 * ROWS, tiles=TOKENS * WIDTH / permute.COPY_WIDTH))
    types = {"grad": "*bf16", "rows": "*bf16", "places": "*i64", "weights": "*fp32", "grad_rows": "*bf16",
             "grad_weights": "*fp32", "width": "i32"}
    yield _case("moe_permute", "unpermute backward", permute.unpermute_backward_kernel, types,
                {"TOP_K": TOP_K, "BLOCK_WIDTH": WIDTH}, warps=8,
                work=streaming(moved=2 * spread + packed + 16 * ROWS, tiles=TOKENS))


def _casts() -> Iterator[Case]:
    numbers = {"values": "*fp8e4nv", "scales": "*fp32", "rows": "i32", "cols": "i32", "largest": "fp32",
               "smallest": "fp32"}
    shape = {"BLOCK_ROWS": cast.ROWS_PER_PROGRAM, "SIDE": cast.SIDE}
    for top_k in (0, TOP_K):
        rows = TOKENS if top_k else ROWS
        moved = rows * WIDTH * 2 + ROWS * WIDTH * (1 + 4 / 128) + (8 * ROWS if top_k else 0)
        yield _case("quant_cast", "1x128 into expert order" if top_k else "1x128", cast.row_cast_kernel,
                    {"x": "*bf16", "places": "*i64", **numbers}, {"TOP_K": top_k, **shape}, warps=cast.WARPS,
                    divisible=("cols",), capabilities=FP8_CHIPS, quick=not top_k,
                    work=streaming(moved=moved, tiles=rows / cast.ROWS_PER_PROGRAM * WIDTH / 128))
    elements = LOCAL_EXPERTS * 2 * EXPERT_WIDTH * WIDTH
    for transposed in (False, True):
        yield _case("quant_cast", "128x128, transposed" if transposed else "128x128", cast.block_cast_kernel,
                    {"x": "*bf16", **numbers}, {"TRANSPOSED": transposed, "SIDE": cast.SIDE}, warps=8,
                    divisible=("cols", "rows"), capabilities=FP8_CHIPS,
                    work=streaming(moved=3 * elements, tiles=elements / 128**2))


def _bits_and_adamw() -> Iterator[Case]:
    rows, width = bits.blocks_of(BITS)
    blocks, elements = {"BLOCK_ROWS": rows, "BLOCK_WIDTH": width}, BITS_CELLS * BITS
    types = {"logits": "*bf16", "bits": "*u8", "weights": "*fp32", "out": "*fp32", **WIDE}
    yield _case("bit_cross_entropy", "forward", bits.bit_forward_kernel, types, blocks, warps=bits.WARPS,
                work=streaming(moved=3 * elements + 8 * BITS_CELLS, tiles=BITS_CELLS / rows))
    types = {"logits": "*bf16", "bits": "*u8", "weights": "*fp32", "grad": "*fp32", "grad_logits": "*bf16",
             "grad_weights": "*fp32", **WIDE}
    yield _case("bit_cross_entropy", "backward", bits.bit_backward_kernel, types, blocks, warps=bits.WARPS,
                work=streaming(moved=5 * elements + 12 * BITS_CELLS, tiles=BITS_CELLS / rows))
    constants = {"SCALED": True, "COPIES": True, "GRADIENT": bfloat16,
                 "ALIGNMENT": adamw.VECTOR_BYTES, "CHUNK": adamw.CHUNK}
    yield _case("adamw", "bf16 gradients and copies", adamw.adamw_kernel, ADAMW_TYPES, constants, warps=adamw.WARPS,
                divisible=(), work=streaming(moved=28 * PARAMETERS, tiles=PARAMETERS / adamw.CHUNK))


def _compact() -> Iterator[Case]:
    """What a lane executes per element is counted in the loop of sm_90's machine code; sm_80's differs by 1 or 2."""
    coded = 4 + 16 / BLOCK
    variants = {  # weights and moments beside bf16 gradients: bytes and instructions per element
        "bf16 weights, 8-bit moments": (bfloat16, True, 6 + coded, 103),
        "fp32 masters, bf16 copies, 8-bit moments": (float32, True, 12 + coded, 93),
        "bf16 weights, fp32 moments": (bfloat16, False, 6 + 16, 60),
    }
    for name, (weights, is_coded, least, instructions) in variants.items():
        constants = {"SCALED": True, "CODED": is_coded, "COPIES": weights == float32, "PARAMETER": weights,
                     "GRADIENT": bfloat16, "ALIGNMENT": adamw.VECTOR_BYTES, "CHUNK": compact.CHUNK}
        options = dict(compact.OPTIONS)
        source = Source(compact.adamw_compact_kernel, ADAMW_TYPES, constants, (), options.pop("num_warps"), 3, options)
        yield Case("adamw_compact", name, functools.partial(_same, source),
                   functools.partial(_compact_work, least, instructions), quick=weights == bfloat16 and is_coded)


def _same(source: Source, capability: int) -> Source:
    return source


def _compact_work(least: float, instructions: int, capability: int) -> Work:
    """A lane starts one instruction per clock, which is half the peak rate, all of it on sm_80: there a sum of products
    takes two clocks, with one of integers beside it. A program reads 12 bytes of tables."""
    operations = instructions * (1 if capability == 80 else 2) * PARAMETERS
    return streaming(
        moved=(least + 12 / compact.CHUNK) * PARAMETERS, least=least * PARAMETERS, tiles=PARAMETERS / compact.CHUNK,
        operations=operations,
    )
