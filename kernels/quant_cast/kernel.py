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
    x, sources, values, scales, rows, cols, largest, smallest,
    GATHERS: tl.constexpr, BLOCK_ROWS: tl.constexpr, SIDE: tl.constexpr,
):
    """BLOCK_ROWS rows of one block of 128 columns, a scale for each row. GATHERS: row r of x is sources[r]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    place = row[:, None] * cols + col[None, :]
    source = tl.load(sources + row, mask=row < rows, other=0).to(tl.int64) if GATHERS else row
    value = tl.load(x + source[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), smallest) / largest
    tl.store(scales + row * tl.num_programs(1) + tl.program_id(1), scale, mask=row < rows)
    tl.store(values + place, (value / scale[:, None]).to(tl.float8e4nv), mask=inside)


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
    scale = tl.maximum(tl.max(tl.max(tl.abs(value), axis=1), axis=0), smallest) / largest
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
        _cast_rows(x, sources=None, values=values, scales=scales)
    else:
        grid = (ceil_div(rows, SIDE), ceil_div(cols, SIDE), x.numel() // (rows * cols))
        block_cast_kernel[grid](
            x, values, scales, rows, cols, LARGEST, SMALLEST_PEAK, transposed, SIDE, num_warps=8
        )
    return values, scales


@torch.library.custom_op("ernie5::gather_cast", mutates_args=())
def gather_cast_triton(x: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values e4m3, scales fp32) of x[sources] with a scale per 1 x 128."""
    values, scales = _fake_gather(x, sources)
    if values.numel():
        _cast_rows(x.contiguous(), sources=sources, values=values, scales=scales)
    return values, scales


def _cast_rows(x: torch.Tensor, *, sources: torch.Tensor | None, values: torch.Tensor, scales: torch.Tensor) -> None:
    cols = values.shape[-1]
    rows = values.numel() // cols
    row_cast_kernel[(ceil_div(rows, ROWS_PER_PROGRAM), ceil_div(cols, SIDE))](
        x, x if sources is None else sources, values, scales, rows, cols, LARGEST, SMALLEST_PEAK,
        sources is not None, ROWS_PER_PROGRAM, SIDE, num_warps=WARPS,
    )


@gather_cast_triton.register_fake
def _fake_gather(x: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.new_empty((sources.shape[0], x.shape[1]), dtype=torch.float8_e4m3fn)
    return values, x.new_empty((sources.shape[0], ceil_div(x.shape[1], SIDE)), dtype=torch.float32)


def _results(x: torch.Tensor, *, block_rows: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape[-1:-3:-1] if transposed else x.shape[-2:]
    values = x.new_empty((*x.shape[:-2], rows, cols), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((*x.shape[:-2], ceil_div(rows, block_rows), ceil_div(cols, SIDE)), dtype=torch.float32)
    return values, scales


@quant_cast_triton.register_fake
def _fake(x: torch.Tensor, block_rows: int, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(x, block_rows=block_rows, transposed=transposed)
