"""Cross-entropy of bits in Triton: logits, bits and weights read once in each direction, nothing between written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import ceil_div, power_of_two

TILE_ELEMENTS = 2048
WARPS = 4


@triton.jit
def nats_of(logit, bit):
    """max(x, 0) - x b + log(1 + exp(-|x|)); the last term keeps its digits where the exponential is small."""
    tail = tl.exp(-tl.abs(logit))
    one = 1.0 + tail
    rest = tl.where(one == 1.0, tail, tl.log(one) * (tail / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(logit, 0.0) - logit * bit + rest


@triton.jit
def bit_forward_kernel(
    logits, bits, weights, out, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """out[n] = weights[n] sum_d nats."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    place = row[:, None] * width + col[None, :]
    logit = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    bit = tl.load(bits + place, mask=inside, other=0).to(tl.float32)
    total = tl.sum(tl.where(inside, nats_of(logit, bit), 0.0), axis=1)
    weight = tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, total * weight, mask=row < rows)


@triton.jit
def bit_backward_kernel(
    logits, bits, weights, grad, grad_logits, grad_weights, rows, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """d logit = g w (sigmoid(x) - b), d w = g sum_d nats."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    place = row[:, None] * width + col[None, :]
    logit = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    bit = tl.load(bits + place, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row, mask=row < rows, other=0.0).to(tl.float32)
    change = (upstream * weight)[:, None] * (tl.sigmoid(logit) - bit)
    tl.store(grad_logits + place, change.to(grad_logits.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(inside, nats_of(logit, bit), 0.0), axis=1) * upstream
    tl.store(grad_weights + row, total.to(grad_weights.dtype.element_ty), mask=row < rows)


def blocks_of(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile; heads have at most some hundred bits."""
    columns = power_of_two(width, least=16)
    return max(1, TILE_ELEMENTS // columns), columns


@torch.library.custom_op("ernie5::bit_cross_entropy", mutates_args=())
def bit_cross_entropy_triton(logits: torch.Tensor, bits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted nats per cell [N] fp32."""
    rows, width = logits.shape
    out = logits.new_empty((rows,), dtype=torch.float32)
    if rows:
        block_rows, block_width = blocks_of(width)
        bit_forward_kernel[(ceil_div(rows, block_rows),)](
            logits.contiguous(), bits.contiguous(), weights.contiguous(), out, rows, width, block_rows, block_width,
            num_warps=WARPS,
        )
    return out


@torch.library.custom_op("ernie5::bit_cross_entropy_backward", mutates_args=())
def bit_backward(
    logits: torch.Tensor, bits: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of logits and weights."""
    rows, width = logits.shape
    grad_logits, grad_weights = logits.new_empty(logits.shape), weights.new_empty(weights.shape)
    if rows:
        block_rows, block_width = blocks_of(width)
        bit_backward_kernel[(ceil_div(rows, block_rows),)](
            logits.contiguous(), bits.contiguous(), weights.contiguous(), grad.contiguous(), grad_logits, grad_weights,
            rows, width, block_rows, block_width, num_warps=WARPS,
        )
    return grad_logits, grad_weights


@bit_cross_entropy_triton.register_fake
def _fake_forward(logits: torch.Tensor, bits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)


@bit_backward.register_fake
def _fake_backward(
    logits: torch.Tensor, bits: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.new_empty(logits.shape), weights.new_empty(weights.shape)


def _save(ctx, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_logits, grad_weights = bit_backward(*ctx.saved_tensors, grad)
    return grad_logits, None, grad_weights


bit_cross_entropy_triton.register_autograd(_gradients, setup_context=_save)
