"""Cross-entropy of a linear head in Triton: logits live in registers, tile by tile.

Forward: programs over (128 rows, a share of the vocabulary) keep a running maximum, the sum of exponentials and the
target's logit; the shares are merged afterwards, which is also how ranks that hold parts of the vocabulary merge.
Backward: chunks of rows write (softmax - onehot) in the dtype of the rows and two library products use it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..grouped_gemm.kernel import SHARED_TILES, precision_of, swizzled
from ..grouped_gemm.tiles import fits_tma
from ..launch import capability_of, ceil_div, num_processors

DELTA_BYTES = 1 << 30  # each chunk reads the head and its fp32 gradient once more


@dataclasses.dataclass(frozen=True)
class HeadTiles:
    """rows x cols logits per tile, `inner` of the width per step."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    uses_tma: bool = False


def choose_tiles(*, capability: int, element_bytes: int) -> HeadTiles:
    """Tiles by chip; fp32 heads, which have no tensor core of their own precision, get small ones."""
    if element_bytes == 4:
        return HeadTiles(32, 32, 32, warps=4, stages=2)
    if capability < 90:
        return HeadTiles(128, 128, 32, warps=8, stages=3)
    return HeadTiles(128, 128, 64, warps=8, stages=4, uses_tma=True)


@triton.jit
def logits_tile(
    hidden, weight, first_row, first_col, rows, cols, inner, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):
    """hidden[first_row..] weight[first_col..]^T in fp32; what lies outside is undefined or zero."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    col = first_col + tl.arange(0, BLOCK_COLS)
    step = tl.arange(0, BLOCK_INNER)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        if TMA:
            left = hidden.load([first_row, start])
            right = weight.load([first_col, start]).T
        else:
            at = start + step
            left = tl.load(
                hidden + row.to(tl.int64)[:, None] * inner + at[None, :],
                mask=(row < rows)[:, None] & (at < inner)[None, :], other=0.0,
            )
            right = tl.load(
                weight + col.to(tl.int64)[None, :] * inner + at[:, None],
                mask=(col < cols)[None, :] & (at < inner)[:, None], other=0.0,
            )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def statistics_kernel(
    hidden, weight, targets, peaks, masses, picks, rows, cols, inner, first_id, share,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr, SHARED: tl.constexpr,
):
    """Per row and share of `share` columns: max logit, sum exp(logit - max), logit of the target if it lies here.

    Programs that run together have SHARED row tiles between them, whose hidden states stay in L2.
    """
    row_tile, part = swizzled(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, share), SHARED)
    first_row = row_tile * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    target = tl.load(targets + row, mask=row < rows, other=-1) - first_id
    peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    pick = tl.zeros((BLOCK_ROWS,), tl.float32)
    begin = part * share
    for first_col in range(begin, tl.minimum(begin + share, cols), BLOCK_COLS):
        logits = logits_tile(
            hidden, weight, first_row, first_col, rows, cols, inner, TMA, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER
        )
        col = first_col + tl.arange(0, BLOCK_COLS)
        logits = tl.where((col < cols)[None, :], logits, float("-inf"))
        pick += tl.sum(tl.where(col[None, :] == target[:, None], logits, 0.0), axis=1)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        mass = mass * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        peak = higher
    place = part.to(tl.int64) * rows + row
    tl.store(peaks + place, peak, mask=row < rows)
    tl.store(masses + place, mass, mask=row < rows)
    tl.store(picks + place, pick, mask=row < rows)


@triton.jit
def delta_kernel(
    hidden, weight, targets, normalisers, upstream, delta, rows, cols, inner, first_id,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_INNER: tl.constexpr, SHARED: tl.constexpr,
):
    """delta = (exp(logit - normaliser) - [column is the target]) * upstream, one tile per program."""
    row_tile, col_tile = swizzled(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(cols, BLOCK_COLS), SHARED)
    first_row, first_col = row_tile * BLOCK_ROWS, col_tile * BLOCK_COLS
    logits = logits_tile(
        hidden, weight, first_row, first_col, rows, cols, inner, TMA, PRECISION, BLOCK_ROWS, BLOCK_COLS, BLOCK_INNER
    )
    row = first_row + tl.arange(0, BLOCK_ROWS)
    col = first_col + tl.arange(0, BLOCK_COLS)
    target = tl.load(targets + row, mask=row < rows, other=-1) - first_id
    normaliser = tl.load(normalisers + row, mask=row < rows, other=0.0)
    change = tl.exp(logits - normaliser[:, None]) - tl.where(col[None, :] == target[:, None], 1.0, 0.0)
    change *= tl.load(upstream)
    place = row.to(tl.int64)[:, None] * cols + col[None, :]
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(delta + place, change.to(delta.dtype.element_ty), mask=mask)


def operands(
    hidden: torch.Tensor, weight: torch.Tensor, *, tiles: HeadTiles
) -> tuple[torch.Tensor | TensorDescriptor, torch.Tensor | TensorDescriptor, bool]:
    """(hidden, weight, whether they are descriptors)."""
    if not (tiles.uses_tma and fits_tma(hidden, weight)):
        return hidden, weight, False
    return (
        TensorDescriptor.from_tensor(hidden, [tiles.rows, tiles.inner]),
        TensorDescriptor.from_tensor(weight, [tiles.cols, tiles.inner]),
        True,
    )


@torch.library.custom_op("ernie5::vocabulary_partials", mutates_args=())
def partials_triton(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, first_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(peak, mass, pick), each [N] fp32, over the ids first_id .. first_id + V - 1 that weight [V, D] holds."""
    hidden, (cols, inner), rows, targets = hidden.contiguous(), weight.shape, hidden.shape[0], targets.contiguous()
    if not rows:
        return _rows_fp32(hidden), _rows_fp32(hidden), _rows_fp32(hidden)
    tiles = choose_tiles(capability=capability_of(hidden.device), element_bytes=hidden.element_size())
    row_tiles, col_tiles = ceil_div(rows, tiles.rows), ceil_div(cols, tiles.cols)
    shares = min(col_tiles, 2 * ceil_div(num_processors(hidden.device), min(row_tiles, SHARED_TILES)))
    share = ceil_div(col_tiles, shares) * tiles.cols
    shares = ceil_div(cols, share)
    peaks, masses, picks = (hidden.new_empty((shares, rows), dtype=torch.float32) for _ in range(3))
    left, right, tma = operands(hidden, weight, tiles=tiles)
    statistics_kernel[(row_tiles * shares,)](
        left, right, targets, peaks, masses, picks, rows, cols, inner, first_id, share, tma, precision_of(hidden.dtype),
        tiles.rows, tiles.cols, tiles.inner, SHARED_TILES, num_warps=tiles.warps, num_stages=tiles.stages,
    )
    peak = peaks.amax(0)
    return peak, (masses * (peaks - peak).exp()).sum(0), picks.sum(0)


@torch.library.custom_op("ernie5::linear_cross_entropy_backward", mutates_args=())
def gradients_triton(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, normalisers: torch.Tensor, grad: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden and weight given each row's log-sum-exp over the whole vocabulary and the scalar `grad`.

    With a part of the vocabulary the gradient of hidden is a partial sum over its holders.
    """
    hidden, (cols, inner), targets = hidden.contiguous(), weight.shape, targets.contiguous()
    tiles = choose_tiles(capability=capability_of(hidden.device), element_bytes=hidden.element_size())
    chunk = max(tiles.rows, DELTA_BYTES // (cols * hidden.element_size()) // tiles.rows * tiles.rows)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None  # one chunk needs no fp32 sum
    for start in range(0, hidden.shape[0], chunk):
        rows = hidden[start : start + chunk]
        delta = rows.new_empty(rows.shape[0], cols)
        left, right, tma = operands(rows, weight, tiles=tiles)
        delta_kernel[(ceil_div(rows.shape[0], tiles.rows) * ceil_div(cols, tiles.cols),)](
            left, right, targets[start : start + chunk], normalisers[start : start + chunk], grad, delta,
            rows.shape[0], cols, inner, first_id, tma, precision_of(hidden.dtype),
            tiles.rows, tiles.cols, tiles.inner, SHARED_TILES, num_warps=tiles.warps, num_stages=tiles.stages,
        )
        torch.mm(delta, weight, out=grad_hidden[start : start + chunk])
        product = delta.T @ rows
        grad_weight = product if grad_weight is None else grad_weight.float().add_(product)
    return grad_hidden, torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)


@torch.library.custom_op("ernie5::linear_cross_entropy", mutates_args=())
def cross_entropy_op(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of nats, 0-d fp32; log-sum-exp of each row [N] fp32)."""
    peak, mass, pick = partials_triton(hidden, weight, targets, 0)
    normalisers = mass.log() + peak
    return (normalisers - pick).sum(), normalisers


def _rows_fp32(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty((hidden.shape[0],), dtype=torch.float32)


@partials_triton.register_fake
def _fake_partials(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, first_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _rows_fp32(hidden), _rows_fp32(hidden), _rows_fp32(hidden)


@gradients_triton.register_fake
def _fake_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, normalisers: torch.Tensor, grad: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


@cross_entropy_op.register_fake
def _fake_forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty((), dtype=torch.float32), _rows_fp32(hidden)


def _save(ctx, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return *gradients_triton(*ctx.saved_tensors, grad, 0), None


cross_entropy_op.register_autograd(_gradients, setup_context=_save)


def linear_cross_entropy_triton(
    hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target]."""
    return cross_entropy_op(hidden, weight, targets)[0]
