"""Rotation of pairs by the C++ library: one pass; the gradient turns back."""

from __future__ import annotations

import ctypes

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads


class NativeRotation(torch.autograd.Function):
    """x [B, T, H, C] times rotation [B, T, C/2] complex64, pair by pair; gradients times its conjugate."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rotation)
        return _turned(x, rotation, turn=1.0)

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _turned(grad, ctx.saved_tensors[0], turn=-1.0), None


def _turned(x: torch.Tensor, rotation: torch.Tensor, *, turn: float) -> torch.Tensor:
    x, rotation = x.contiguous(), rotation.contiguous()
    out = torch.empty_like(x)
    native_library().ernie5_rotate(
        is_narrow(x), *map(pointer, (x, rotation, out)), *sizes(rotation.shape[0] * rotation.shape[1], *x.shape[2:]),
        ctypes.c_float(turn), threads(),
    )
    return out
