"""All experts by the C++ library: one thread per expert, both products and SwiGLU on rows that stay in its cache."""

from __future__ import annotations

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads


class NativeExperts(torch.autograd.Function):
    """See `experts`. Keeps rows and the first product; SwiGLU is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx,
        rows: torch.Tensor,
        row_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        rows, gate_up, down = rows.contiguous(), gate_up.contiguous(), down.contiguous()
        ctx.weights_dtype = row_weights.dtype
        row_weights, offsets = row_weights.float().resolve_neg().contiguous(), offsets.long().contiguous()
        middle, out = rows.new_empty(rows.shape[0], gate_up.shape[1]), torch.empty_like(rows)
        native_library().ernie5_experts_forward(
            is_narrow(rows), *map(pointer, (rows, row_weights, offsets, gate_up, down, middle, out)),
            *_sizes(rows, gate_up), threads(),
        )
        ctx.save_for_backward(rows, row_weights, gate_up, down, offsets, middle)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, row_weights, gate_up, down, offsets, middle = ctx.saved_tensors
        grad = grad.contiguous()
        grads = [torch.empty_like(tensor) for tensor in (rows, row_weights, gate_up, down)]
        native_library().ernie5_experts_backward(
            is_narrow(rows),
            *map(pointer, (rows, row_weights, offsets, gate_up, down, middle, grad, *grads)),
            *_sizes(rows, gate_up), threads(),
        )
        grads[1] = grads[1].to(ctx.weights_dtype)
        return *grads, None


def _sizes(rows: torch.Tensor, gate_up: torch.Tensor) -> list:
    return sizes(*rows.shape, gate_up.shape[1] // 2, gate_up.shape[0])
