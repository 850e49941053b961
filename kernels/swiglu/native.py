"""SwiGLU by the C++ library: one pass over memory each way."""

from __future__ import annotations

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads


class NativeSwiGLU(torch.autograd.Function):
    """y = silu(g) u p per row; see `FusedSwiGLU`."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        weights = None if row_weights is None else row_weights.float().resolve_neg().contiguous()
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        native_library().ernie5_swiglu_forward(
            is_narrow(gate_up), *map(pointer, (gate_up, weights, out)), *_sizes(gate_up), threads()
        )
        ctx.weights_dtype = None if row_weights is None else row_weights.dtype
        ctx.save_for_backward(gate_up, weights)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, weights = ctx.saved_tensors
        grad = grad.contiguous()
        grad_input, grad_weights = torch.empty_like(gate_up), None if weights is None else torch.empty_like(weights)
        native_library().ernie5_swiglu_backward(
            is_narrow(gate_up), *map(pointer, (gate_up, weights, grad, grad_input, grad_weights)),
            *_sizes(gate_up), threads(),
        )
        return grad_input, None if grad_weights is None else grad_weights.to(ctx.weights_dtype)


def _sizes(gate_up: torch.Tensor) -> list:
    return sizes(gate_up.shape[:-1].numel(), gate_up.shape[-1] // 2)
