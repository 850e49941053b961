"""Cross-entropy of a linear head by the C++ library: logits of a few rows at a time, gradients at once (chunked.py)."""

from __future__ import annotations

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads


class NativeLinearCrossEntropy(torch.autograd.Function):
    """Sum of nats over rows, 0-d fp32; losses are kept per row and added in fp64."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
        grads = [torch.empty_like(t) if need else None
                 for t, need in zip((hidden, weight), ctx.needs_input_grad, strict=False)]
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        native_library().ernie5_cross_entropy(
            is_narrow(hidden), *map(pointer, (hidden, weight, targets, *grads, losses)),
            *sizes(*hidden.shape, weight.shape[0]), threads(),
        )
        if hidden.shape[0] == 0 and grads[1] is not None:
            grads[1].zero_()
        ctx.save_for_backward(*grads)
        return losses.double().sum().float()

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(None if kept is None else kept * grad for kept in ctx.saved_tensors), None  # grad: see chunked.py
