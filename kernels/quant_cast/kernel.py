"""Scaled casts in Triton: one read of x, one write of the values and scales; transposed weights from the same tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import ceil_div
from .reference import LARGEST, SIDE, SMALLEST_PEAK

ROWS_PER_PROGRAM = 16
WARPS = 4


@triton.jit
def row_cast_kernel(
    x, places, values, scales, rows, cols, largest, smallest,
    TOP_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, SIDE: tl.constexpr,
):
    """BLOCK_ROWS rows of one block of 128 columns, a scale for each row.

    TOP_K > 0: row r is written to rows places[r, 0..K-1] of the result instead of to row r.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    col = block * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    value = tl.load(x + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.math.div_rn(tl.maximum(tl.max(tl.abs(value), axis=1), smallest), largest)  # "/" may be off by an ulp
    narrow = (value / scale[:, None]).to(tl.float8e4nv)
    if TOP_K == 0:
        tl.store(scales + row * blocks + block, scale, mask=row < rows)
        tl.store(values + row[:, None] * cols + col[None, :], narrow, mask=inside)
    for k in tl.static_range(TOP_K):
        place = tl.load(places + row * TOP_K + k, mask=row < rows, other=0)
        tl.store(scales + place * blocks + block, scale, mask=row < rows)
        tl.store(values + place[:, None] * cols + col[None, :], narrow, mask=inside)


@triton.jit
def block_cast_kernel(
    x, values, scales, rows, cols, largest, smallest, TRANSPOSED: tl.constexpr, SIDE: tl.constexpr
):
    """One block of 128 x 128 of one matrix, a single scale; written where its transpose belongs if TRANSPOSED."""
    row = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    col = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    matrix = tl.program_id(2).to(tl.int64)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    base = matrix * rows * cols
    place = base + row.to(tl.int64)[:, None] * cols + col[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.math.div_rn(tl.maximum(tl.max(tl.max(tl.abs(value), axis=1), axis=0), smallest), largest)
    narrow = (value / scale).to(tl.float8e4nv)
    tall, wide = tl.num_programs(0), tl.num_programs(1)
    if TRANSPOSED:
        tl.store(scales + (matrix * wide + tl.program_id(1)) * tall + tl.program_id(0), scale)
        tl.store(
            values + base + col.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(narrow), mask=tl.trans(inside)
        )
    else:
        tl.store(scales + (matrix * tall + tl.program_id(0)) * wide + tl.program_id(1), scale)
        tl.store(values + place, narrow, mask=inside)


@torch.library.custom_op("ernie5::quant_cast", mutates_args=())
def quant_cast_triton(x: torch.Tensor, block_rows: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(values e4m3, scales fp32) of x [R, C] or [E, R, C]; see the public function."""
    x = x.contiguous()
    rows, cols = x.shape[-2:]
    values, scales = _results(x, block_rows=block_rows, transposed=transposed)
    if not values.numel():
        return values, scales
    if block_rows == 1:
        _cast_rows(x, places=None, values=values, scales=scales)
    else:
        grid = (ceil_div(rows, SIDE), ceil_div(cols, SIDE), x.numel() // (rows * cols))
        block_cast_kernel[grid](
            x, values, scales, rows, cols, LARGEST, SMALLEST_PEAK, transposed, SIDE, num_warps=8
        )
    return values, scales


@torch.library.custom_op("ernie5::spread_cast", mutates_args=())
def spread_cast_triton(x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values e4m3, scales fp32) with row places[n, k] that of x[n], a scale per 1 x 128."""
    values, scales = _fake_spread(x, places)
    if values.numel():
        _cast_rows(x.contiguous(), places=places.contiguous(), values=values, scales=scales)
    return values, scales


def _cast_rows(x: torch.Tensor, *, places: torch.Tensor | None, values: torch.Tensor, scales: torch.Tensor) -> None:
    cols = values.shape[-1]
    rows = x.numel() // cols
    row_cast_kernel[(ceil_div(rows, ROWS_PER_PROGRAM), ceil_div(cols, SIDE))](
        x, x if places is None else places, values, scales, rows, cols, LARGEST, SMALLEST_PEAK,
        0 if places is None else places.shape[1], ROWS_PER_PROGRAM, SIDE, num_warps=WARPS,
    )


@spread_cast_triton.register_fake
def _fake_spread(x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty((places.shape[0] * places.shape[1], x.shape[1]), dtype=torch.float8_e4m3fn)
    return values, x.new_empty((values.shape[0], ceil_div(x.shape[1], SIDE)), dtype=torch.float32)


def _results(x: torch.Tensor, *, block_rows: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape[-1:-3:-1] if transposed else x.shape[-2:]
    values = x.new_empty((*x.shape[:-2], rows, cols), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((*x.shape[:-2], ceil_div(rows, block_rows), ceil_div(cols, SIDE)), dtype=torch.float32)
    return values, scales


@quant_cast_triton.register_fake
def _fake(x: torch.Tensor, block_rows: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(x, block_rows=block_rows, transposed=transposed)
