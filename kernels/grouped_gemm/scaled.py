"""Grouped products in fp8: e4m3 operands, a scale per 1 x 128 of the rows and per 128 x 128 of the weights.

Each step of 128 along the contraction is multiplied in fp8 with fp32 sums, scaled, and added in fp32 registers, which
also bounds the error of the tensor core's short accumulator (DeepSeek-V3, arXiv:2412.19437, section 3.3).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import first_order
from ..launch import ceil_div, num_processors, power_of_two
from ..quant_cast import ScaledTensor, quant_cast
from ..quant_cast.reference import SIDE
from .kernel import SHARED_TILES, grouped_outer, swizzled
from .tiles import most_programs, most_tiles, tile_table


@triton.jit
def scaled_rows_kernel(
    x, weight, x_scales, weight_scales, out, table, count, groups, inner, cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, SIDE: tl.constexpr, SHARED: tl.constexpr,
):
    """out[r] = weight[g(r)] x[r] with weight [E, cols, inner]; BLOCK_COLS is at most 128, so one scale per tile."""
    SWAPPED: tl.constexpr = BLOCK_ROWS < 64
    col_tiles = tl.cdiv(cols, BLOCK_COLS)
    row_tiles = tl.load(count)
    steps = tl.cdiv(inner, SIDE)
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=False):
        row_tile, col_tile = swizzled(tile, row_tiles, col_tiles, SHARED)
        group = tl.load(table + 3 * row_tile)
        first = tl.load(table + 3 * row_tile + 1)
        end = tl.load(table + 3 * row_tile + 2)
        own_steps = tl.where(group < groups, steps, 0)
        group = tl.minimum(group, groups - 1).to(tl.int64)
        row = first + tl.arange(0, BLOCK_ROWS)
        col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        lane = tl.arange(0, SIDE)
        left_base = x + row.to(tl.int64)[:, None] * inner
        right_base = weight + group * cols * inner + col.to(tl.int64)[None, :] * inner
        row_scales = x_scales + row.to(tl.int64) * steps
        tile_scales = weight_scales + (group * tl.cdiv(cols, SIDE) + col_tile * BLOCK_COLS // SIDE) * steps
        if SWAPPED:
            total = tl.zeros((BLOCK_COLS, BLOCK_ROWS), tl.float32)
        else:
            total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for step in range(0, own_steps):
            at = step * SIDE + lane
            left = tl.load(left_base + at[None, :], mask=(row < end)[:, None] & (at < inner)[None, :], other=0.0)
            right = tl.load(right_base + at[:, None], mask=(at < inner)[:, None] & (col < cols)[None, :], other=0.0)
            scale = tl.load(row_scales + step, mask=row < end, other=0.0) * tl.load(tile_scales + step)
            if SWAPPED:
                total += tl.dot(right.T, left.T) * scale[None, :]
            else:
                total += tl.dot(left, right) * scale[:, None]
        result = (total.T if SWAPPED else total).to(out.dtype.element_ty)
        target = out + row.to(tl.int64)[:, None] * cols + col[None, :]
        tl.store(target, result, mask=(row < end)[:, None] & (col < cols)[None, :])


def multiply_scaled(
    rows: ScaledTensor, *, weight: ScaledTensor, offsets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """y[r] = weight[g(r)] rows[r] in `dtype` for rows [R, K] (1 x 128) and weight [E, M, K] (128 x 128).

    Zeros past the last offset.
    """
    return scaled_gemm_triton(rows.values, rows.scales, weight.values, weight.scales, offsets, dtype)


@torch.library.custom_op("ernie5::scaled_gemm", mutates_args=())
def scaled_gemm_triton(
    rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    offsets: torch.Tensor, dtype: torch.dtype,
) -> torch.Tensor:
    """`multiply_scaled` of what its two tensors hold."""
    (groups, cols, inner), num_rows = weight.shape, rows.shape[0]
    out = rows.new_empty((num_rows, cols), dtype=dtype)
    if not out.numel():
        return out
    block = scaled_block_rows(rows=num_rows, groups=groups)
    table, count = tile_table(offsets, rows=num_rows, block_rows=block)
    launched = most_tiles(rows=num_rows, groups=groups, block_rows=block) * ceil_div(cols, SIDE)
    scaled_rows_kernel[(most_programs(tiles=launched, processors=num_processors(rows.device)),)](
        rows, weight, row_scales, weight_scales, out, table, count, groups, inner, cols,
        block, SIDE, SIDE, SHARED_TILES, num_warps=8 if block == 128 else 4, num_stages=3,
    )
    return out


@scaled_gemm_triton.register_fake
def _fake(
    rows: torch.Tensor, row_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    offsets: torch.Tensor, dtype: torch.dtype,
) -> torch.Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[1]), dtype=dtype)


def scaled_block_rows(*, rows: int, groups: int) -> int:
    """Rows per tile by the mean rows of a group, as `choose_tiles` does for bf16."""
    mean = power_of_two(max(1, rows // max(1, groups)))
    return 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 256 else 128


class ScaledGroupedGemm(torch.autograd.Function):
    """y = x W^T and dx = dy W in fp8, dW = dy^T x in the dtype of x: its scales would have to follow ragged groups."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        narrow_rows = quant_cast(rows, block_rows=1, backend="triton")
        narrow_weight = quant_cast(weight, block_rows=SIDE, backend="triton")
        return multiply_scaled(narrow_rows, weight=narrow_weight, offsets=offsets, dtype=rows.dtype)

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        grad, grad_rows = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            narrow_grad = quant_cast(grad, block_rows=1, backend="triton")
            turned = quant_cast(weight, block_rows=SIDE, transposed=True, backend="triton")
            grad_rows = multiply_scaled(narrow_grad, weight=turned, offsets=offsets, dtype=rows.dtype)
        return grad_rows, grouped_outer(grad, rows, offsets) if ctx.needs_input_grad[1] else None, None
