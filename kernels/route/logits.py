"""A router's product outside the C++: bf16 operands multiplied exactly and summed in fp32, with no fp32 copy kept."""

from __future__ import annotations

import torch

from ..checks import first_order, kept_for_product
from ..linear import linear


def router_logits(hidden: torch.Tensor, *, weight: torch.Tensor) -> torch.Tensor:
    """hidden [N, D] times weight [E, D] transposed: [N, E], fp32 for bf16 and fp16, else of their wider dtype.

    Two bf16 numbers have an exact fp32 product, so a GPU's bf16 units lose nothing but the order of sums, and backward
    keeps the operands as they are: fp32 copies of N rows would stay with every layer.
    """
    if hidden.dtype == weight.dtype == torch.bfloat16:
        return _NarrowProduct.apply(hidden, weight)
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return linear(hidden.to(wide), weight=weight.to(wide))


class _NarrowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*kept_for_product(ctx, hidden, weight))
        return _multiply(hidden, weight.t())

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad
        return (
            _multiply_wide(grad, weight).to(weight.dtype) if needs_hidden else None,
            _multiply_wide(grad.t(), hidden).to(hidden.dtype) if needs_weight else None,
        )


def _multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """In fp32; on a GPU both are bf16."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _multiply_wide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """fp32 times bf16: on a GPU as two products of bf16."""
    if not left.is_cuda:
        return _multiply(left, right)
    upper, lower = split_bits(left)
    return _multiply(upper, right) + _multiply(lower, right)


def split_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 x as two bf16 tensors whose sum is x to 2^-16 of each value."""
    upper = x.to(torch.bfloat16)
    return upper, (x - upper.float()).to(torch.bfloat16)
