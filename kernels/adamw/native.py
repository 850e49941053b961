"""AdamW by the C++ library: every tensor of a step in one call, each read and written once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..native.library import addresses, int64s, native_library, threads
from .reference import AdamWStep, AdamWTensors


def adamw_native(
    tensors: Sequence[AdamWTensors], *, step: AdamWStep, gradient_scale: torch.Tensor | None
) -> None:
    """See `adamw`."""
    count = len(tensors)
    scale = 1.0 if gradient_scale is None else float(gradient_scale)
    native_library().ernie5_adamw(
        ctypes.c_int64(count),
        int64s(one.parameter.numel() for one in tensors),
        (ctypes.c_int * count)(*(one.gradient.dtype == torch.bfloat16 for one in tensors)),
        (ctypes.c_float * count)(*(step.keep(one.weight_decay) for one in tensors)),
        addresses(one.parameter for one in tensors),
        addresses(one.gradient for one in tensors),
        addresses(one.first_moment for one in tensors),
        addresses(one.second_moment for one in tensors),
        addresses(one.copy for one in tensors),
        *map(ctypes.c_float, (*step.factors, scale)),
        threads(),
    )
