"""A router by the C++ library: scores that never leave the cache, and a gradient of the chosen experts alone."""

from __future__ import annotations

import ctypes

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads


def route_native(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: torch.Tensor | None,
    choices: torch.Tensor | None, top_k: int, uses_sigmoid: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(choices, weights); see `route`."""
    return NativeRoute.apply(hidden, weight, bias, active, choices, top_k, uses_sigmoid, scale)


class NativeRoute(torch.autograd.Function):
    """Keeps hidden, weight, and of the scores the chosen ones."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, active: torch.Tensor | None,
        given: torch.Tensor | None, top_k: int, uses_sigmoid: bool, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, bias = hidden.contiguous(), weight.contiguous(), bias.resolve_neg().contiguous()
        active = None if active is None else active.contiguous()
        slots = hidden.shape[0], top_k
        choices = hidden.new_empty(slots, dtype=torch.int64) if given is None else given.clone().contiguous()
        scores, weights = bias.new_empty(slots), bias.new_empty(slots)  # fp32, whatever the program's default is
        ctx.rule = (ctypes.c_float(scale), ctypes.c_int(uses_sigmoid))
        native_library().ernie5_route(
            is_narrow(hidden), *map(pointer, (hidden, weight, bias, active, choices, scores, weights)),
            *sizes(*hidden.shape, weight.shape[0], top_k), *ctx.rule, ctypes.c_int(given is not None), threads(),
        )
        ctx.save_for_backward(hidden, weight, choices, scores)
        ctx.mark_non_differentiable(choices)
        return choices, weights

    @staticmethod
    @first_order
    def backward(ctx, _: None, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, choices, scores = ctx.saved_tensors
        grad, grad_hidden, grad_weight = grad.contiguous(), torch.empty_like(hidden), torch.empty_like(weight)
        native_library().ernie5_route_backward(
            is_narrow(hidden), *map(pointer, (hidden, weight, choices, scores, grad, grad_hidden, grad_weight)),
            *sizes(*hidden.shape, weight.shape[0], choices.shape[1]), *ctx.rule, threads(),
        )
        return grad_hidden, grad_weight, None, None, None, None, None, None
