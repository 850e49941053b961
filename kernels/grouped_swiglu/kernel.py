"""Experts' first product in Triton with SwiGLU and the rows' weights in its epilogue, and rows gathered as they load.

A tile holds as many gate columns as up columns, the same ones, in one accumulator: the weight is read as [E, 2, F, D],
so that the tensor core multiplies one wide operand as in `rows_kernel`, and both halves of a pair lie in one thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ernie5.errors import KernelError

from ..grouped_gemm.kernel import SHARED_TILES, grouped_gemm_triton, grouped_outer, precision_of, swizzled
from ..grouped_gemm.tiles import (
    TMA_FROM,
    GemmTiles,
    choose_tiles,
    fits_tma,
    most_programs,
    most_tiles,
    read_wide,
    tile_table,
)
from ..launch import capability_of, ceil_div, num_processors
from ..moe_permute.kernel import unpermute_triton
from ..swiglu.kernel import swiglu_backward


@triton.jit
def weight_block(
    gate_up, group, half, col, start, inner, width,
    TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):
    """BLOCK_INNER elements of weight rows, [rows, BLOCK_INNER]: columns col of halves half, 0 being gate and 1 up.

    half and col: one of each per row; by TMA the first half and column alone, and the descriptor's block says the rest.
    """
    if TMA:
        block = gate_up.load([group, half, col, start])
        rows: tl.constexpr = block.shape[1] * BLOCK_COLS
        return block.reshape(rows, BLOCK_INNER)
    else:
        step = start + tl.arange(0, BLOCK_INNER)
        place = ((group.to(tl.int64) * 2 + half) * width + col) * inner
        mask = (col < width)[:, None] & (step < (start + BLOCK_INNER if EVEN else inner))[None, :]
        return tl.load(gate_up + place[:, None] + step[None, :], mask=mask, other=0.0)


@triton.jit
def store_gated(gate, up, first, out, row_weights, row, end, owned, col, width, KEEPS: tl.constexpr):
    """The product, where KEEPS, and row_weights silu(gate) up; weights from row `owned` on are not read but zero."""
    mask = (row < end)[:, None] & (col < width)[None, :]
    line = row.to(tl.int64)[:, None] * width
    if KEEPS:
        place = first + 2 * line + col[None, :]
        tl.store(place, gate.to(first.dtype.element_ty), mask=mask)
        tl.store(place + width, up.to(first.dtype.element_ty), mask=mask)
    weight = tl.load(row_weights + row, mask=row < owned, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(out + line + col[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_rows_kernel(
    x, gate_up, row_weights, first, out, sources, table, count, groups, inner, width,
    GATHERS: tl.constexpr, TMA: tl.constexpr, SPECIALIZES: tl.constexpr, KEEPS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    SHARED: tl.constexpr,
):
    """out[r] = row_weights[r] silu(gate) up with (gate, up) = gate_up[g(r)] x[r], which `first` keeps where KEEPS.

    gate_up [E, 2 * width, inner]; BLOCK_COLS columns of either half. TMA: gate_up is a descriptor of [E, 2, width,
    inner], x one too unless GATHERS, which reads row sources[r]. Tiles past the end (group E) store zeros.
    """
    SWAPPED: tl.constexpr = BLOCK_ROWS < 64
    WIDE: tl.constexpr = 2 * BLOCK_COLS
    col_tiles = tl.cdiv(width, BLOCK_COLS)
    row_tiles = tl.load(count)
    for tile in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=False, warp_specialize=SPECIALIZES
    ):
        row_tile, col_tile = swizzled(tile, row_tiles, col_tiles, SHARED)
        group = tl.load(table + 3 * row_tile)
        begin = tl.load(table + 3 * row_tile + 1)
        end = tl.load(table + 3 * row_tile + 2)
        owned = tl.where(group < groups, end, 0)
        limit = tl.where(group < groups, inner, 0)
        group = tl.minimum(group, groups - 1)
        row = begin + tl.arange(0, BLOCK_ROWS)
        step = tl.arange(0, BLOCK_INNER)
        if GATHERS or not TMA:
            source = tl.load(sources + row, mask=row < end, other=0).to(tl.int64) if GATHERS else row.to(tl.int64)
        at = col_tile * BLOCK_COLS
        col = at + tl.arange(0, BLOCK_COLS)
        wide = tl.arange(0, WIDE)
        if SWAPPED:
            gates, ups = tl.zeros((BLOCK_COLS, BLOCK_ROWS), tl.float32), tl.zeros((BLOCK_COLS, BLOCK_ROWS), tl.float32)
        else:
            total = tl.zeros((BLOCK_ROWS, WIDE), tl.float32)
        for start in range(0, limit, BLOCK_INNER):
            if GATHERS or not TMA:
                inside = step < (BLOCK_INNER if EVEN else inner - start)
                place = source[:, None] * inner + (start + step)[None, :]
                left = tl.load(x + place, mask=(row < end)[:, None] & inside[None, :], other=0.0)
            else:
                left = x.load([begin, start])
            if SWAPPED:
                one = weight_block(
                    gate_up, group, 0, at if TMA else col, start, inner, width, TMA, EVEN, BLOCK_COLS, BLOCK_INNER
                )
                other = weight_block(
                    gate_up, group, 1, at if TMA else col, start, inner, width, TMA, EVEN, BLOCK_COLS, BLOCK_INNER
                )
                gates = tl.dot(one, left.T, gates, input_precision=PRECISION)
                ups = tl.dot(other, left.T, ups, input_precision=PRECISION)
            else:
                both = weight_block(
                    gate_up, group, 0 if TMA else wide // BLOCK_COLS, at if TMA else at + wide % BLOCK_COLS, start,
                    inner, width, TMA, EVEN, BLOCK_COLS, BLOCK_INNER,
                )
                total = tl.dot(left, both.T, total, input_precision=PRECISION)
        if SWAPPED:
            gate, up = gates.T, ups.T
        else:
            gate, up = total.reshape(BLOCK_ROWS, 2, BLOCK_COLS).permute(0, 2, 1).split()
        store_gated(gate, up, first, out, row_weights, row, end, owned, col, width, KEEPS)


def gathers_by_default(device: torch.device) -> bool:
    """Where there is no TMA: rows are read by the same instructions then, gathered or not (kernels/README.md)."""
    return capability_of(device) < TMA_FROM


def halves_at_once(tiles: GemmTiles) -> int:
    """One wide operand of both halves; where rows are the second operand, one of 64 weight columns for each half."""
    return 1 if tiles.rows < 64 else 2


def multiply_gated(
    x: torch.Tensor,
    *,
    gate_up: torch.Tensor,
    row_weights: torch.Tensor,
    offsets: torch.Tensor,
    sources: torch.Tensor | None = None,
    keeps: bool = True,
    tiles: GemmTiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch gated_rows_kernel: (activated [R, F], first [R, 2F], or [0] where it is not kept).

    sources [R] gathers rows of x. tiles: by default those of `choose_tiles`.
    """
    groups, twice, inner = gate_up.shape
    rows, width = x.shape[0] if sources is None else sources.shape[0], twice // 2
    out, first = _results(x, rows=rows, twice=twice, keeps=keeps)
    if not out.numel():
        return out, first
    if tiles is None:
        capability = capability_of(x.device)
        tiles = choose_tiles(
            rows=rows, groups=groups, capability=capability, element_bytes=x.element_size(),
            reads_wide=read_wide(x, gate_up, capability=capability),
        )
    tma = tiles.uses_tma and fits_tma(x, gate_up)
    block = tiles.cols // 2
    table, count = tile_table(offsets, rows=rows, block_rows=tiles.rows)
    launched = most_tiles(rows=rows, groups=groups, block_rows=tiles.rows) * ceil_div(width, block)
    weight = gate_up.view(groups, 2, width, inner)
    gated_rows_kernel[(most_programs(tiles=launched, processors=tiles.programs * num_processors(x.device)),)](
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.inner]) if tma and sources is None else x,
        TensorDescriptor.from_tensor(weight, [1, halves_at_once(tiles), block, tiles.inner]) if tma else weight,
        row_weights, first, out, table if sources is None else sources, table, count, groups, inner, width,
        sources is not None, tma, tma and tiles.specializes and sources is None, keeps, inner % tiles.inner == 0,
        precision_of(x.dtype), tiles.rows, block, tiles.inner, SHARED_TILES,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )
    return out, first


def _results(x: torch.Tensor, *, rows: int, twice: int, keeps: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(rows, twice // 2), x.new_empty((rows, twice) if keeps else (0,))


@torch.library.custom_op("ernie5::grouped_swiglu", mutates_args=())
def grouped_swiglu_triton(
    x: torch.Tensor, gate_up: torch.Tensor, row_weights: torch.Tensor, offsets: torch.Tensor,
    sources: torch.Tensor | None, places: torch.Tensor | None, keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row_weights silu(gate) up [R, F], (gate, up) [R, 2F]): `keeps` the latter, without which there is no gradient.

    sources [R] and places [N, K]: x is tokens [N, D] and row r token sources[r], or both are None and x rows [R, D].
    """
    return multiply_gated(
        x.contiguous(), gate_up=gate_up, row_weights=row_weights.contiguous(), offsets=offsets, sources=sources,
        keeps=keeps,
    )


@grouped_swiglu_triton.register_fake
def _fake(
    x: torch.Tensor, gate_up: torch.Tensor, row_weights: torch.Tensor, offsets: torch.Tensor,
    sources: torch.Tensor | None, places: torch.Tensor | None, keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[0] if sources is None else sources.shape[0]
    return _results(x, rows=rows, twice=gate_up.shape[1], keeps=keeps)


def _save(ctx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as the product come in as its gradient
    ctx.keeps = inputs[6]


def _gradients(ctx, grad: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    if not ctx.keeps:
        raise KernelError("grouped_swiglu: backward of a product that was not kept. Call the operator with keeps=True")
    x, gate_up, row_weights, offsets, sources, places, first = ctx.saved_tensors
    grad_first, grad_weights = swiglu_backward(first, row_weights, grad)
    grad_x = grad_gate_up = None
    if ctx.needs_input_grad[0]:
        grad_x = grouped_gemm_triton(grad_first, gate_up, offsets, True)
        grad_x = grad_x if places is None else unpermute_triton(grad_x, places, None)
    if ctx.needs_input_grad[1]:
        grad_gate_up = grouped_outer(grad_first, x, offsets, sources)
    return grad_x, grad_gate_up, grad_weights, None, None, None, None


grouped_swiglu_triton.register_autograd(_gradients, setup_context=_save)
