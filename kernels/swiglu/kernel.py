"""SwiGLU in Triton: each input read once, each output written once, in both directions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import ceil_div, power_of_two

FORWARD_ROWS, FORWARD_WIDTH, WARPS = 4, 512, 4
BACKWARD_WIDTH = 1024


@triton.jit
def swiglu_forward_kernel(
    gate_up, row_weights, out, rows, width,
    WEIGHTED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """out[r, f] = silu(gate_up[r, f]) gate_up[r, width + f] row_weights[r]; one tile per program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    source = gate_up + row[:, None] * (2 * width) + col[None, :]
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        value *= tl.load(row_weights + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + row[:, None] * width + col[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gate_up, row_weights, grad, grad_gate_up, grad_weights, rows, width,
    WEIGHTED: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """With s = sigmoid(g): dg = dy p u s (1 + g (1 - s)), du = dy p g s, dp = sum_f dy g s u. One row per program."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(row_weights + row).to(tl.float32) if WEIGHTED else 1.0
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        col = start + tl.arange(0, BLOCK_WIDTH)
        inside = col < width
        source = row * (2 * width) + col
        gate = tl.load(gate_up + source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + source + width, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + row * width + col, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        activated = gate * sigmoid
        weighted = upstream * weight
        grad_gate = weighted * up * (sigmoid + activated * (1.0 - sigmoid))
        tl.store(grad_gate_up + source, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
        grad_up = weighted * activated
        tl.store(grad_gate_up + source + width, grad_up.to(grad_gate_up.dtype.element_ty), mask=inside)
        if WEIGHTED:
            total += upstream * activated * up
    if WEIGHTED:
        tl.store(grad_weights + row, tl.sum(total).to(grad_weights.dtype.element_ty))


@torch.library.custom_op("ernie5::swiglu", mutates_args=())
def swiglu_triton(gate_up: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
    """silu(gate) up [..., F], times row_weights [...] where given, for gate_up [..., 2F]."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    rows = gate_up.shape[:-1].numel()
    if out.numel() == 0:
        return out
    weights = gate_up if row_weights is None else row_weights.contiguous()
    block = min(FORWARD_WIDTH, power_of_two(width, least=16))
    grid = (ceil_div(rows, FORWARD_ROWS), ceil_div(width, block))
    swiglu_forward_kernel[grid](
        gate_up, weights, out, rows, width, row_weights is not None, FORWARD_ROWS, block, num_warps=WARPS
    )
    return out


@torch.library.custom_op("ernie5::swiglu_backward", mutates_args=())
def swiglu_backward(
    gate_up: torch.Tensor, row_weights: torch.Tensor | None, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate_up and of row_weights (empty where there are none)."""
    gate_up, grad, width = gate_up.contiguous(), grad.contiguous(), grad.shape[-1]
    grad_gate_up = torch.empty_like(gate_up)
    weights = gate_up if row_weights is None else row_weights.contiguous()
    grad_weights = gate_up.new_empty(0) if row_weights is None else torch.empty_like(weights)
    rows = grad.shape[:-1].numel()
    if rows:
        block = min(BACKWARD_WIDTH, power_of_two(width, least=16))
        swiglu_backward_kernel[(rows,)](
            gate_up, weights, grad, grad_gate_up, grad_weights, rows, width, row_weights is not None, block,
            num_warps=WARPS,
        )
    return grad_gate_up, grad_weights


@swiglu_triton.register_fake
def _fake_forward(gate_up: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@swiglu_backward.register_fake
def _fake_backward(
    gate_up: torch.Tensor, row_weights: torch.Tensor | None, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = gate_up.new_empty(0) if row_weights is None else row_weights.new_empty(row_weights.shape)
    return gate_up.new_empty(gate_up.shape), weights


def _save(ctx, inputs: tuple[torch.Tensor, torch.Tensor | None], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    gate_up, row_weights = ctx.saved_tensors
    grad_gate_up, grad_weights = swiglu_backward(gate_up, row_weights, grad)
    return grad_gate_up, None if row_weights is None else grad_weights


swiglu_triton.register_autograd(_gradients, setup_context=_save)
