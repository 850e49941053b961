"""RMSNorm by the C++ library: one pass over memory each way."""

from __future__ import annotations

import ctypes

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads


class NativeRMSNorm(torch.autograd.Function):
    """y = x r w with r = (mean x^2 + eps)^-1/2; see `FusedRMSNorm`."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
        native_library().ernie5_norm_forward(
            is_narrow(x), *map(pointer, (x, weight, out, inverse)), *sizes(inverse.numel(), x.shape[-1]),
            ctypes.c_float(eps), threads(),
        )
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        native_library().ernie5_norm_backward(
            is_narrow(x), *map(pointer, (x, weight, inverse, grad, grad_x, grad_weight)),
            *sizes(inverse.numel(), x.shape[-1]), threads(),
        )
        return grad_x, grad_weight, None
