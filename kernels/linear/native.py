"""A linear map by the C++ library: the weight is packed per call, small products cost no preparation."""

from __future__ import annotations

import ctypes

import torch

from ..checks import first_order, kept_for_product
from ..native.library import is_narrow, native_library, pointer, sizes, threads


class NativeLinear(torch.autograd.Function):
    """y = x W^T, dx = dy W, dW = dy^T x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(*kept_for_product(ctx, x, weight))
        return _product(x, weight, columns=weight.shape[0], transposed=True)

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _product(grad, weight, columns=weight.shape[1], transposed=False) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = x.new_empty(grad.shape[-1], x.shape[-1])
            native_library().ernie5_outer(
                is_narrow(x), *map(pointer, (grad, x, grad_weight)),
                *sizes(*grad_weight.shape, x.numel() // max(1, x.shape[-1])), threads(),
            )
        return grad_x, grad_weight


def _product(x: torch.Tensor, weight: torch.Tensor, *, columns: int, transposed: bool) -> torch.Tensor:
    out = x.new_empty(*x.shape[:-1], columns)
    native_library().ernie5_product(
        is_narrow(x), *map(pointer, (x, weight, out)), *sizes(out.numel() // max(1, columns), x.shape[-1], columns),
        ctypes.c_int(transposed), threads(),
    )
    return out
