"""Rotation of interleaved pairs in Triton; the gradient is the same kernel with the opposite angle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import ceil_div, power_of_two, readable

TILE_ELEMENTS = 2048
WARPS = 4


@triton.jit
def rope3d_kernel(
    x, rotation, out, tokens, heads, pairs, stride_row, stride_token, stride_head, row_tokens, sign,
    BLOCK_TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):
    """Turn the pairs of BLOCK_TOKENS tokens head by head; a token's rotation is read once for all of its heads."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    pair = tl.arange(0, BLOCK_PAIRS)
    lane = tl.arange(0, 2 * BLOCK_PAIRS)
    inside = (token < tokens)[:, None] & (lane < 2 * pairs)[None, :]
    turn = tl.load(rotation + token[:, None] * (2 * pairs) + lane[None, :], mask=inside, other=0.0)
    cos, sin = tl.split(tl.reshape(turn, (BLOCK_TOKENS, BLOCK_PAIRS, 2)))
    sin = sin * sign
    start = (token // row_tokens) * stride_row + (token % row_tokens) * stride_token
    source = x + start[:, None] + lane[None, :]
    target = out + token[:, None] * (2 * pairs * heads) + lane[None, :]
    for head in range(heads):
        value = tl.load(source + head * stride_head, mask=inside, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(value, (BLOCK_TOKENS, BLOCK_PAIRS, 2)))
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        flat = tl.reshape(turned, (BLOCK_TOKENS, 2 * BLOCK_PAIRS)).to(out.dtype.element_ty)
        tl.store(target + head * (2 * pairs), flat, mask=inside)


@torch.library.custom_op("ernie5::rope3d", mutates_args=())
def rope3d_triton(x: torch.Tensor, rotation: torch.Tensor, sign: float) -> torch.Tensor:
    """Turn x [B, T, H, C] by sign times the angles of rotation [B, T, C/2, 2] (fp32 cosines and sines).

    Any strides over B, T and H are read in place (a slice of a fused projection); the last dimension is contiguous.
    """
    x = readable(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    row_tokens, heads, pairs = x.shape[1], x.shape[2], x.shape[3] // 2
    if out.numel():
        tokens = x.shape[0] * row_tokens
        block_pairs = power_of_two(pairs, least=8)
        block_tokens = max(1, TILE_ELEMENTS // (2 * block_pairs))
        rope3d_kernel[(ceil_div(tokens, block_tokens),)](
            x, rotation.contiguous(), out, tokens, heads, pairs, *x.stride()[:3], row_tokens, sign,
            block_tokens, block_pairs, num_warps=WARPS,
        )
    return out


@rope3d_triton.register_fake
def _fake(x: torch.Tensor, rotation: torch.Tensor, sign: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx, inputs: tuple[torch.Tensor, torch.Tensor, float], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.sign = inputs[2]


def _gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return rope3d_triton(grad, ctx.saved_tensors[0], -ctx.sign), None, None


rope3d_triton.register_autograd(_gradients, setup_context=_save)
