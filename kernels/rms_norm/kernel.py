"""RMSNorm in Triton: whole rows in registers, one pass forward, one pass backward plus a small sum over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import require
from ..launch import ceil_div, num_processors, power_of_two

WIDEST = 16384
TILE_ELEMENTS = 2048
PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def rms_norm_forward_kernel(
    x, weight, out, inverse, rows, width, eps, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """out = x r w with r = (mean x^2 + eps)^-1/2 over BLOCK_ROWS rows; r is kept for the backward pass."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    place = row[:, None] * width + col[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / width + eps)
    tl.store(inverse + row, scale, mask=row < rows)
    gain = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(out + place, (value * scale[:, None] * gain[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    x, weight, inverse, grad, grad_x, partial, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """With u = x r: dx = r (w dy - u mean(w dy u)); each program sums dy u over its rows into partial[program]."""
    col = tl.arange(0, BLOCK_WIDTH)
    gain = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK_ROWS, rows, step):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (col < width)[None, :]
        place = row[:, None] * width + col[None, :]
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
        upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(upstream * unit, axis=0)
        wide = upstream * gain[None, :]
        mean = tl.sum(wide * unit, axis=1) / width
        value = (wide - unit * mean[:, None]) * scale
        tl.store(grad_x + place, value.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * width + col, total, mask=col < width)


def blocks_of(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile: a whole row, and as many rows as make TILE_ELEMENTS."""
    columns = power_of_two(width, least=16)
    rows = max(1, min(16, TILE_ELEMENTS // columns))
    return rows, columns, max(4, min(16, rows * columns // 512))


@torch.library.custom_op("ernie5::rms_norm", mutates_args=())
def rms_norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised x [..., D], inverse root mean squares [...] fp32)."""
    x, width = x.contiguous(), x.shape[-1]
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        rows = inverse.numel()
        block_rows, block_width, warps = blocks_of(width)
        rms_norm_forward_kernel[(ceil_div(rows, block_rows),)](
            x, weight.contiguous(), out, inverse, rows, width, eps, block_rows, block_width, num_warps=warps
        )
    return out, inverse


@torch.library.custom_op("ernie5::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight; the sum over programs has a fixed order, so it repeats bit for bit."""
    x, grad, width = x.contiguous(), grad.contiguous(), x.shape[-1]
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    rows = inverse.numel()
    block_rows, block_width, warps = blocks_of(width)
    programs = min(ceil_div(rows, block_rows), PROGRAMS_PER_PROCESSOR * num_processors(x.device))
    partial = x.new_empty((programs, width), dtype=torch.float32)
    rms_norm_backward_kernel[(programs,)](
        x, weight.contiguous(), inverse, grad, grad_x, partial, rows, width, block_rows, block_width, num_warps=warps
    )
    return grad_x, partial.sum(0).to(weight.dtype)


@rms_norm_op.register_fake
def _fake_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@rms_norm_backward.register_fake
def _fake_backward(
    x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs: tuple[torch.Tensor, torch.Tensor, float], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return *rms_norm_backward(*ctx.saved_tensors, grad), None


rms_norm_op.register_autograd(_gradients, setup_context=_save)


def rms_norm_triton(x: torch.Tensor, *, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of x [..., D] with D at most WIDEST."""
    rule = f"the last dimension may be at most {WIDEST} wide, a row is held in registers; use backend torch"
    require(x.shape[-1] <= WIDEST, op="rms_norm", name="x", tensor=x, rule=rule)
    return rms_norm_op(x, weight, eps)[0]
