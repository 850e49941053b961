"""Grouped products in Triton: persistent programs over a tile table, accumulation in fp32, no word from the host.

`rows_kernel` makes y = x W^T and dx = dy W, `outer_kernel` dW = dy^T x. Strides of a group's weight are int64: 384
experts of 4096 x 2048 pass 2^31 elements. Rows past the last offset get zeros and their operands are never used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..launch import capability_of, ceil_div, num_processors
from .tiles import GemmTiles, choose_tiles, column_tiles, fits_tma, most_programs, most_tiles, read_wide, tile_table

SHARED_TILES = 8
LONG_SUM = 2048


@triton.jit
def swizzled(tile, row_tiles, col_tiles, SHARED: tl.constexpr):
    """(row tile, column tile) so that SHARED neighbouring row tiles, mostly of one group, share a weight tile in L2."""
    width = SHARED * col_tiles
    first = tile // width * SHARED
    size = tl.minimum(row_tiles - first, SHARED)
    return first + tile % width % size, tile % width // size


@triton.jit
def rows_kernel(
    x, weight, out, table, count, groups, inner, cols,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, SPECIALIZES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    SHARED: tl.constexpr,
):
    """out[r] = weight[g(r)] x[r], weight being [E, cols, inner], or [E, inner, cols] where TRANSPOSED.

    TMA: x and weight are descriptors. A tile of rows past the end (group E) runs no step of the inner loop, hence
    stores zeros.
    """
    SWAPPED: tl.constexpr = BLOCK_ROWS < 64
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row_tiles = tl.load(count)
    for tile in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=False, warp_specialize=SPECIALIZES
    ):
        row_tile, col_tile = swizzled(tile, row_tiles, col_tiles, SHARED)
        group = tl.load(table + 3 * row_tile)
        first = tl.load(table + 3 * row_tile + 1)
        end = tl.load(table + 3 * row_tile + 2)
        limit = tl.where(group < groups, inner, 0)
        group = tl.minimum(group, groups - 1)
        row = first + tl.arange(0, BLOCK_ROWS)
        col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        step = tl.arange(0, BLOCK_INNER)
        if not TMA:
            line = x + row.to(tl.int64)[:, None] * inner
            base = weight + group.to(tl.int64) * cols * inner
        if SWAPPED:
            total = tl.zeros((BLOCK_COLS, BLOCK_ROWS), tl.float32)
        else:
            total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, limit, BLOCK_INNER):
            if TMA:
                left = x.load([first, start])
                if TRANSPOSED:
                    right = weight.load([group, start, col_tile * BLOCK_COLS]).reshape(BLOCK_INNER, BLOCK_COLS)
                else:
                    right = weight.load([group, col_tile * BLOCK_COLS, start]).reshape(BLOCK_COLS, BLOCK_INNER).T
            else:
                inside = step < (BLOCK_INNER if EVEN else inner - start)
                left = tl.load(
                    line + (start + step)[None, :], mask=(row < end)[:, None] & inside[None, :], other=0.0
                )
                if TRANSPOSED:
                    place = (start + step).to(tl.int64)[:, None] * cols + col[None, :]
                else:
                    place = (start + step)[:, None] + col.to(tl.int64)[None, :] * inner
                right = tl.load(base + place, mask=inside[:, None] & (col < cols)[None, :], other=0.0)
            if SWAPPED:
                total = tl.dot(right.T, left.T, total, input_precision=PRECISION)
            else:
                total = tl.dot(left, right, total, input_precision=PRECISION)
        result = (total.T if SWAPPED else total).to(out.dtype.element_ty)
        target = out + row.to(tl.int64)[:, None] * cols + col[None, :]
        tl.store(target, result, mask=(row < end)[:, None] & (col < cols)[None, :])


@triton.jit
def outer_kernel(
    left, right, left_rows, right_rows, out, sources, offsets, groups, left_width, right_width,
    GATHERS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, SHARED: tl.constexpr,
):
    """out[g] = left[rows of g]^T right[rows of g], zeros for a group without rows; [E, left_width, right_width].

    GATHERS: row r of `right` is sources[r]. TMA: whole blocks come through the descriptors left_rows and right_rows,
    the ragged last one is read with a mask, because TMA would bring rows of the next group.
    """
    left_tiles = tl.cdiv(left_width, BLOCK_LEFT)
    right_tiles = tl.cdiv(right_width, BLOCK_RIGHT)
    for tile in tl.range(tl.program_id(0), groups * left_tiles * right_tiles, tl.num_programs(0), flatten=False):
        group = tile // (left_tiles * right_tiles)
        left_tile, right_tile = swizzled(tile % (left_tiles * right_tiles), left_tiles, right_tiles, SHARED)
        left_at = left_tile * BLOCK_LEFT
        right_at = right_tile * BLOCK_RIGHT
        begin = tl.load(offsets + group - 1, mask=group > 0, other=0).to(tl.int32)
        end = tl.load(offsets + group).to(tl.int32)
        left_col = left_at + tl.arange(0, BLOCK_LEFT)
        right_col = right_at + tl.arange(0, BLOCK_RIGHT)
        total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
        masked_from = begin
        if TMA:
            masked_from = begin + (end - begin) // BLOCK_ROWS * BLOCK_ROWS
            for start in range(begin, masked_from, BLOCK_ROWS):
                one, other = left_rows.load([start, left_at]), right_rows.load([start, right_at])
                total = tl.dot(one.T, other, total, input_precision=PRECISION)
        for start in range(masked_from, end, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS)
            inside = row < end
            source = tl.load(sources + row, mask=inside, other=0).to(tl.int64) if GATHERS else row.to(tl.int64)
            one = tl.load(
                left + row.to(tl.int64)[:, None] * left_width + left_col[None, :],
                mask=inside[:, None] & (left_col < left_width)[None, :], other=0.0,
            )
            other = tl.load(
                right + source[:, None] * right_width + right_col[None, :],
                mask=inside[:, None] & (right_col < right_width)[None, :], other=0.0,
            )
            total = tl.dot(one.T, other, total, input_precision=PRECISION)
        target = out + group.to(tl.int64) * left_width * right_width
        place = left_col.to(tl.int64)[:, None] * right_width + right_col[None, :]
        mask = (left_col < left_width)[:, None] & (right_col < right_width)[None, :]
        tl.store(target + place, total.to(out.dtype.element_ty), mask=mask)


def precision_of(dtype: torch.dtype) -> str:
    """fp32 is multiplied as fp32; narrower types have one way only."""
    return "ieee" if dtype == torch.float32 else "tf32"


def multiply_rows(
    x: torch.Tensor,
    *,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    transposed: bool,
    tiles: GemmTiles | None = None,
) -> torch.Tensor:
    """Launch rows_kernel; tiles: by default those of `choose_tiles`."""
    groups, inner, cols = weight.shape if transposed else (weight.shape[0], weight.shape[2], weight.shape[1])
    rows = x.shape[0]
    out = x.new_empty(rows, cols)
    if not out.numel():
        return out
    if tiles is None:
        capability = capability_of(x.device)
        tiles = choose_tiles(
            rows=rows, groups=groups, capability=capability, element_bytes=x.element_size(),
            reads_wide=read_wide(x, weight, capability=capability),
        )
    tma = tiles.uses_tma and fits_tma(x, weight)
    table, count = tile_table(offsets, rows=rows, block_rows=tiles.rows)
    launched = most_tiles(rows=rows, groups=groups, block_rows=tiles.rows) * column_tiles(cols, tiles=tiles)
    block = [1, tiles.inner, tiles.cols] if transposed else [1, tiles.cols, tiles.inner]
    rows_kernel[(most_programs(tiles=launched, processors=tiles.programs * num_processors(x.device)),)](
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.inner]) if tma else x,
        TensorDescriptor.from_tensor(weight, block) if tma else weight,
        out, table, count, groups, inner, cols, transposed, tma, tma and tiles.specializes, inner % tiles.inner == 0,
        precision_of(x.dtype), tiles.rows, tiles.cols, tiles.inner, SHARED_TILES,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )
    return out


def outer_tiles(
    *, rows: int, groups: int, capability: int, element_bytes: int, reads_wide: bool = True
) -> GemmTiles:
    """Tiles of dW: rows are the contraction here, `inner` of them per step.

    On sm_90 long sums (a mean of 2,048 rows) take 128 x 256, which reads a fifth less shared memory per FLOP; short
    ones two programs of 128 x 128, one of which stores while the other multiplies (README, measured on a GPU).
    reads_wide: as for `choose_tiles`.
    """
    if element_bytes == 4:
        return GemmTiles(64, 64, 32, warps=4, stages=2)
    if capability < 90:
        return GemmTiles(128, 128, 32, warps=8, stages=3)
    if not reads_wide:
        return GemmTiles(128, 128, 32, warps=8, stages=2)
    if capability >= 100 or rows >= LONG_SUM * groups:
        return GemmTiles(128, 256, 64, warps=8, stages=3, uses_tma=True)
    return GemmTiles(128, 128, 64, warps=8, stages=3, uses_tma=True, programs=2)


def multiply_outer(
    left: torch.Tensor,
    *,
    right: torch.Tensor,
    offsets: torch.Tensor,
    sources: torch.Tensor | None = None,
    tiles: GemmTiles | None = None,
) -> torch.Tensor:
    """Launch outer_kernel: left [R, M], right [R, K] (rows picked by sources [R] where given) -> [E, M, K]."""
    groups, left_width, right_width = offsets.shape[0], left.shape[1], right.shape[1]
    out = left.new_empty(groups, left_width, right_width)
    if not out.numel():
        return out
    if not left.shape[0]:
        return out.zero_()
    if tiles is None:
        capability = capability_of(left.device)
        tiles = outer_tiles(
            rows=left.shape[0], groups=groups, capability=capability, element_bytes=left.element_size(),
            reads_wide=read_wide(left, right, capability=capability),
        )
    tma = tiles.uses_tma and sources is None and fits_tma(left, right)
    launched = groups * ceil_div(left_width, tiles.rows) * ceil_div(right_width, tiles.cols)
    outer_kernel[(most_programs(tiles=launched, processors=tiles.programs * num_processors(left.device)),)](
        left, right,
        TensorDescriptor.from_tensor(left, [tiles.inner, tiles.rows]) if tma else left,
        TensorDescriptor.from_tensor(right, [tiles.inner, tiles.cols]) if tma else right,
        out, offsets if sources is None else sources, offsets, groups, left_width, right_width,
        sources is not None, tma, precision_of(left.dtype), tiles.inner, tiles.rows, tiles.cols, SHARED_TILES,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )
    return out


@torch.library.custom_op("ernie5::grouped_gemm", mutates_args=())
def grouped_gemm_triton(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, transposed: bool
) -> torch.Tensor:
    """y[r] = weight[g(r)] rows[r], or its transpose; zeros past the last offset."""
    return multiply_rows(rows.contiguous(), weight=weight, offsets=offsets, transposed=transposed)


@torch.library.custom_op("ernie5::grouped_outer", mutates_args=())
def grouped_outer(
    left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor, sources: torch.Tensor | None = None
) -> torch.Tensor:
    """left^T right per group: [E, M, K] for left [R, M] and right [R, K], or rows sources [R] of right [N, K]."""
    return multiply_outer(left.contiguous(), right=right.contiguous(), offsets=offsets, sources=sources)


@grouped_gemm_triton.register_fake
def _fake_rows(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, transposed: bool) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2 if transposed else 1])


@grouped_outer.register_fake
def _fake_outer(
    left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor, sources: torch.Tensor | None = None
) -> torch.Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def _save(ctx, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.transposed = inputs[3]


def _gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    rows, weight, offsets = ctx.saved_tensors
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = grouped_gemm_triton(grad, weight, offsets, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        pair = (rows, grad) if ctx.transposed else (grad, rows)
        grad_weight = grouped_outer(*pair, offsets)
    return grad_rows, grad_weight, None, None


grouped_gemm_triton.register_autograd(_gradients, setup_context=_save)
