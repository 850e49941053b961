"""Configurations of the kernels that multiply matrices: grouped products, heads, attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from cases import (
    EXPERT_WIDTH,
    HEAD_WIDTH,
    KEY_HEADS,
    LOCAL_EXPERTS,
    QUERY_HEADS,
    ROWS,
    TOKENS,
    TOP_K,
    VOCABULARY,
    WIDTH,
    Case,
    Work,
    product,
)
from chips import CHIPS
from compiler import Source

from ernie5_kernels.attention import kernel as attention
from ernie5_kernels.grouped_gemm import kernel as grouped
from ernie5_kernels.grouped_gemm import scaled
from ernie5_kernels.grouped_gemm.tiles import GemmTiles, choose_tiles
from ernie5_kernels.grouped_swiglu import kernel as gated
from ernie5_kernels.linear_cross_entropy import kernel as head

SPARSE_ROWS = {16: "mean 16 rows", 32: "mean 32 rows", 128: "mean 128 rows"}
PRECISION = "tf32"
ODD = "odd widths"  # an address per element: what the compiler is told is that nothing divides a width


def cases() -> Iterator[Case]:
    """Grouped products in bf16 and fp8, the linear head, attention."""
    even = ROWS // LOCAL_EXPERTS
    for rows, name in {**SPARSE_ROWS, even: "even load"}.items():
        for transposed in (False, True):
            yield _rows(rows, name=name, transposed=transposed)
    for rows, name in {256: "mean 256 rows", even: "even load"}.items():
        yield _outer(rows, name=name)
    yield _outer(even, name="even load, gathered", gathers=True)
    for rows, name in {32: "mean 32 rows", even: "even load"}.items():
        for transposed in (False, True):
            yield _rows(rows, name=f"{name}, {ODD}", transposed=transposed, odd=True)
        yield _gated(rows, name=f"{name}, {ODD}", gathers=False, odd=True)
    yield _outer(even, name=f"even load, {ODD}", odd=True)
    for gathers in (False, True):
        for rows, name in {**SPARSE_ROWS, even: "even load"}.items():
            yield _gated(rows, name=name, gathers=gathers)
    for rows, name in {32: "mean 32 rows", even: "even load"}.items():
        yield _scaled(rows, name=name)
    yield _head(head.statistics_kernel)
    yield _head(head.delta_kernel)
    yield from _attention()


def processors_of(capability: int) -> int:
    """Processors of the chip."""
    return next(chip.processors for chip in CHIPS if chip.capability == capability)


def _work(rows: int, *, cols: int, inner: int, element_bytes: int, tiles: GemmTiles) -> Work:
    return product(
        rows=rows * LOCAL_EXPERTS, cols=cols, inner=inner, groups=LOCAL_EXPERTS, tiles=tiles,
        shared=grouped.SHARED_TILES, element_bytes=element_bytes,
    )


def _tiles_at(rows: int, odd: bool, capability: int) -> GemmTiles:
    return choose_tiles(
        rows=rows * LOCAL_EXPERTS, groups=LOCAL_EXPERTS, capability=capability, element_bytes=2, reads_wide=not odd
    )


def _rows(rows: int, *, name: str, transposed: bool, odd: bool = False) -> Case:
    tiles_of = functools.partial(_tiles_at, rows, odd)

    def source(capability: int) -> Source:
        t = tiles_of(capability)
        block = (t.inner, t.cols) if transposed else (t.cols, t.inner)
        operands = (
            {"x": f"tensordesc<bf16[{t.rows}, {t.inner}]>", "weight": f"tensordesc<bf16[1, {block[0]}, {block[1]}]>"}
            if t.uses_tma else {"x": "*bf16", "weight": "*bf16"}
        )
        types = {**operands, "out": "*bf16", "table": "*i32", "count": "*i32",
                 "groups": "i32", "inner": "i32", "cols": "i32"}
        constants = {"TRANSPOSED": transposed, "TMA": t.uses_tma, "SPECIALIZES": t.specializes, "EVEN": not odd,
                     "PRECISION": PRECISION, "BLOCK_ROWS": t.rows, "BLOCK_COLS": t.cols, "BLOCK_INNER": t.inner,
                     "SHARED": grouped.SHARED_TILES}
        divisible = () if odd else ("inner", "cols")
        return Source(grouped.rows_kernel, types, constants, divisible, t.warps, t.stages)

    cols, inner = (WIDTH, 2 * EXPERT_WIDTH) if transposed else (2 * EXPERT_WIDTH, WIDTH)
    return Case(
        "grouped_gemm", f"{'dX' if transposed else 'forward'}, {name}", source,
        lambda capability: _work(rows, cols=cols, inner=inner, element_bytes=2, tiles=tiles_of(capability)),
        uses_tensor_core=True, quick=rows == 32 and not transposed and not odd,
        programs_for=lambda capability: tiles_of(capability).programs,
    )


def _gated(rows: int, *, name: str, gathers: bool, odd: bool = False) -> Case:
    """The product with SwiGLU in its epilogue; what is gathered comes from tokens, of which there are TOP_K rows."""
    tiles_of = functools.partial(_tiles_at, rows, odd)

    def source(capability: int) -> Source:
        t = tiles_of(capability)
        columns = t.cols // 2
        block = f"tensordesc<bf16[1, {gated.halves_at_once(t)}, {columns}, {t.inner}]>"
        types = {"x": f"tensordesc<bf16[{t.rows}, {t.inner}]>" if t.uses_tma and not gathers else "*bf16",
                 "gate_up": block if t.uses_tma else "*bf16", "row_weights": "*fp32", "first": "*bf16", "out": "*bf16",
                 "sources": "*i64", "table": "*i32", "count": "*i32", "groups": "i32", "inner": "i32", "width": "i32"}
        constants = {"GATHERS": gathers, "TMA": t.uses_tma, "SPECIALIZES": t.specializes and not gathers, "KEEPS": True,
                     "EVEN": not odd, "PRECISION": PRECISION, "BLOCK_ROWS": t.rows, "BLOCK_COLS": columns,
                     "BLOCK_INNER": t.inner, "SHARED": grouped.SHARED_TILES}
        divisible = () if odd else ("inner", "width")
        return Source(gated.gated_rows_kernel, types, constants, divisible, t.warps, t.stages)

    def work(capability: int) -> Work:
        count, inner = rows * LOCAL_EXPERTS, WIDTH
        one = _work(rows, cols=2 * EXPERT_WIDTH, inner=inner, element_bytes=2, tiles=tiles_of(capability))
        beside = count * EXPERT_WIDTH * 2 + count * (12 if gathers else 4)  # results, weights, sources
        again = count * inner * 2 * (1 - 1 / TOP_K) if gathers else 0.0
        return dataclasses.replace(one, moved=one.moved + beside, least=one.least + beside - again)

    return Case(
        "grouped_swiglu", f"{name}, gathered" if gathers else name, source, work, uses_tensor_core=True,
        quick=rows == 32 and not odd, programs_for=lambda capability: tiles_of(capability).programs,
    )


def _outer(rows: int, *, name: str, gathers: bool = False, odd: bool = False) -> Case:
    """dW of `rows` per expert."""

    def tiles_of(capability: int) -> GemmTiles:
        tiles = grouped.outer_tiles(
            rows=rows * LOCAL_EXPERTS, groups=LOCAL_EXPERTS, capability=capability, element_bytes=2, reads_wide=not odd
        )
        return dataclasses.replace(tiles, uses_tma=False) if gathers else tiles

    return Case(
        "grouped_gemm", f"dW, {name}", lambda capability: _outer_source(tiles_of(capability), gathers=gathers, odd=odd),
        lambda capability: _outer_work(
            rows * LOCAL_EXPERTS, tiles=tiles_of(capability), processors=processors_of(capability)
        ),
        uses_tensor_core=True, programs_for=lambda capability: tiles_of(capability).programs,
    )


def _outer_source(t: GemmTiles, *, gathers: bool, odd: bool) -> Source:
    def operand(cols: int) -> str:
        return f"tensordesc<bf16[{t.inner}, {cols}]>" if t.uses_tma else "*bf16"

    types = {"left": "*bf16", "right": "*bf16", "left_rows": operand(t.rows), "right_rows": operand(t.cols),
             "out": "*bf16", "sources": "*i64", "offsets": "*i64", "groups": "i32", "left_width": "i32",
             "right_width": "i32"}
    constants = {"GATHERS": gathers, "TMA": t.uses_tma, "PRECISION": PRECISION, "BLOCK_ROWS": t.inner,
                 "BLOCK_LEFT": t.rows, "BLOCK_RIGHT": t.cols, "SHARED": grouped.SHARED_TILES}
    divisible = () if odd else ("left_width", "right_width")
    return Source(grouped.outer_kernel, types, constants, divisible, t.warps, t.stages)


def _outer_work(rows: int, *, tiles: GemmTiles, processors: int) -> Work:
    """A wave of programs covers SHARED tiles of `left` and the rest of them over `right`: each is read once a wave."""
    left, right = 2 * EXPERT_WIDTH, WIDTH
    results = LOCAL_EXPERTS * left * right * 2
    left_tiles, right_tiles = -(-left // tiles.rows), -(-right // tiles.cols)
    across = tiles.programs * processors // grouped.SHARED_TILES
    least = rows * (left + right) * 2 + results
    reads_left, reads_right = -(-right_tiles // across), -(-left_tiles // grouped.SHARED_TILES)
    moved = rows * (reads_left * left + reads_right * right) * 2 + results
    return Work(2.0 * rows * left * right, moved, least, LOCAL_EXPERTS * left_tiles * right_tiles, "bf16")


def _scaled(rows: int, *, name: str) -> Case:
    block = scaled.scaled_block_rows(rows=rows * LOCAL_EXPERTS, groups=LOCAL_EXPERTS)
    types = {"x": "*fp8e4nv", "weight": "*fp8e4nv", "x_scales": "*fp32", "weight_scales": "*fp32", "out": "*bf16",
             "table": "*i32", "count": "*i32", "groups": "i32", "inner": "i32", "cols": "i32"}
    constants = {"BLOCK_ROWS": block, "BLOCK_COLS": 128, "SIDE": 128, "SHARED": grouped.SHARED_TILES}
    warps = 8 if block == 128 else 4
    source = Source(scaled.scaled_rows_kernel, types, constants, ("inner", "cols"), warps, 3)
    tiles = GemmTiles(block, 128, 128, warps, 3)
    work = _work(rows, cols=2 * EXPERT_WIDTH, inner=WIDTH, element_bytes=1, tiles=tiles)
    return Case("grouped_gemm", f"fp8, {name}", lambda _: source, lambda _: work, (90, 100), uses_tensor_core=True)


def _head(kernel: object) -> Case:
    def source(capability: int) -> Source:
        t = head.choose_tiles(capability=capability, element_bytes=2)

        def operand(rows: int) -> str:
            return f"tensordesc<bf16[{rows}, {t.inner}]>" if t.uses_tma else "*bf16"

        types = {"hidden": operand(t.rows), "weight": operand(t.cols), "targets": "*i64", "rows": "i32",
                 "cols": "i32", "inner": "i32", "first_id": "i32"}
        divisible = ("inner", "cols")
        if kernel is head.statistics_kernel:
            types.update(peaks="*fp32", masses="*fp32", picks="*fp32", share="i32")
            divisible = ("inner", "cols", "share")
        else:
            types.update(normalisers="*fp32", upstream="*fp32", delta="*bf16")
        types = {name: types[name] for name in kernel.arg_names if name in types}
        constants = {"TMA": t.uses_tma, "PRECISION": PRECISION, "BLOCK_ROWS": t.rows, "BLOCK_COLS": t.cols,
                     "BLOCK_INNER": t.inner, "SHARED": grouped.SHARED_TILES}
        return Source(kernel, types, constants, divisible, t.warps, t.stages)

    def work(capability: int) -> Work:
        """Hidden states of SHARED row tiles (17 MB) stay in L2; the head is read once for each such group of rows."""
        t = head.choose_tiles(capability=capability, element_bytes=2)
        ends = VOCABULARY * WIDTH * 2 + TOKENS * WIDTH * 2
        ends += TOKENS * 12 if kernel is head.statistics_kernel else TOKENS * VOCABULARY * 2
        tiles = -(-TOKENS // t.rows) * -(-VOCABULARY // t.cols)
        again = (-(-TOKENS // t.rows // grouped.SHARED_TILES) - 1) * VOCABULARY * WIDTH * 2
        return Work(2.0 * TOKENS * VOCABULARY * WIDTH, ends + again, ends, tiles, "bf16")

    name = "forward" if kernel is head.statistics_kernel else "softmax - onehot"
    return Case("linear_cross_entropy", name, source, work, uses_tensor_core=True)


def _attention() -> Iterator[Case]:
    kernels: tuple[tuple[str, object, str, Callable[[], dict[str, str]], float], ...] = (
        ("forward", attention.attention_forward_kernel, "forward",
         lambda: {"out": "*bf16", "lse": "*fp32"}, 2),
        ("dK dV", attention.key_gradient_kernel, "keys",
         lambda: {"grad": "*bf16", "lse": "*fp32", "delta": "*fp32", "grad_key": "*bf16", "grad_value": "*bf16",
                  "scale": "fp32"}, 4),
        ("dQ", attention.query_gradient_kernel, "queries",
         lambda: {"grad": "*bf16", "lse": "*fp32", "delta": "*fp32", "grad_query": "*bf16", "scale": "fp32"}, 3),
    )
    for name, kernel, part, extra, products in kernels:
        yield Case(
            "attention", f"{name}, causal", functools.partial(_attention_source, kernel, extra(), part),
            functools.partial(_attention_work, part, products), uses_tensor_core=True,
        )


def _attention_source(kernel: object, extra: dict[str, str], part: str, capability: int) -> Source:
    b = attention.choose_blocks(capability=capability, width=HEAD_WIDTH, element_bytes=2, part=part)
    strides = ("query_row", "query_head", "key_row", "key_head", "value_row", "value_head")
    batches = ("query_batch", "key_batch", "value_batch")
    numbers = ("queries", "keys", "query_start", "heads", "groups", "list_length")
    types = {
        **dict.fromkeys(("query", "key", "value"), "*bf16"), **dict.fromkeys(("intervals", "others", "counts"), "*i32"),
        **dict.fromkeys((*strides, *numbers, "width"), "i32"), **dict.fromkeys(batches, "i64"), "factor": "fp32",
        **extra,
    }
    constants = {"PRECISION": PRECISION, "BLOCK_QUERIES": b.queries, "BLOCK_KEYS": b.keys, "BLOCK_WIDTH": HEAD_WIDTH}
    return Source(kernel, types, constants, (*batches, *strides, "width"), b.warps, b.stages)


def _attention_work(part: str, products: float, capability: int) -> Work:
    """One causal row of 8,192: half the pairs of blocks are visible. Keys and values of a head fit L2 (4 MB)."""
    b = attention.choose_blocks(capability=capability, width=HEAD_WIDTH, element_bytes=2, part=part)
    tensors = TOKENS * HEAD_WIDTH * 2
    least = tensors * (2 * QUERY_HEADS + 2 * KEY_HEADS) * (1 if part == "forward" else 2) + 8 * TOKENS * QUERY_HEADS
    pairs = TOKENS / b.queries * TOKENS / b.keys / 2 * QUERY_HEADS
    operations = 2.0 * products * TOKENS * TOKENS / 2 * HEAD_WIDTH * QUERY_HEADS
    return Work(operations, least, least, pairs, "bf16")
