"""The same by the C++ library, one pass over a tensor."""

from __future__ import annotations

import ctypes

import torch

from ..adamw.reference import AdamWStep
from ..native.library import is_narrow, native_library, pointer, threads
from .reference import CompactTensors


def adamw_compact_native(one: CompactTensors, *, step: AdamWStep, gradient_scale: torch.Tensor | None) -> None:
    """See `adamw_compact`; one tensor."""
    coded = one.first.scales is not None
    values = (None, None) if coded else (one.first.values, one.second.values)
    codes = (one.first.values, one.second.values) if coded else (None, None)
    factors = (step.keep(one.weight_decay), *step.factors, 1.0 if gradient_scale is None else float(gradient_scale))
    native_library().ernie5_adamw_compact(
        ctypes.c_int64(one.parameter.numel()), is_narrow(one.parameter), is_narrow(one.gradient),
        *map(pointer, (one.parameter, one.gradient, *values, *codes, one.first.scales, one.second.scales, one.copy)),
        *map(ctypes.c_float, factors), *map(ctypes.c_uint32, one.seeds(step.number)), threads(),
    )
