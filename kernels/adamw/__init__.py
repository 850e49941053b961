"""AdamW over any number of tensors in one launch per gradient dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import note_writes, require, require_beside, require_part
from ..dispatch import choose_backend
from ..native.library import native_library
from .native import adamw_native
from .reference import AdamWStep, AdamWTensors, adamw_reference

OFFERED = ("triton", "native", "reference")

__all__ = ["AdamWStep", "AdamWTensors", "adamw"]


def adamw(
    tensors: Sequence[AdamWTensors],
    *,
    step: AdamWStep,
    gradient_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Update parameters, moments and copies in place.

    gradient_scale: one fp32 number on the device, such as a clipping factor, so that no host needs to know it.
    Parameters and moments are fp32, gradients fp32 or bf16, copies bf16, everything contiguous. By reference all may be
    fp64, the scale too. Raises KernelError for a backend that cannot run, ValueError for tensors that do not fit.
    """
    if not tensors:
        return
    first = tensors[0].parameter
    for one in tensors:
        _require(one, first=first)
    if gradient_scale is not None:
        holds = gradient_scale.numel() == 1 and gradient_scale.dtype in {torch.float32, first.dtype}
        rule = "it must be one number of float32"
        require(holds, op="adamw", name="gradient_scale", tensor=gradient_scale, rule=rule)
        require_beside(gradient_scale, first=first, op="adamw", name="gradient_scale")
    native = first.device.type == "cpu" and first.dtype == torch.float32 and native_library() is not None
    chosen = choose_backend(
        backend, op="adamw", offered=OFFERED, device=first.device, dtype=first.dtype, native=native
    )
    if chosen == "triton":
        from .kernel import adamw_triton

        rule = "triton's addresses are of float32; use backend reference"
        require(first.dtype == torch.float32, op="adamw", name="parameter", tensor=first, rule=rule)
        adamw_triton(tensors, step=step, gradient_scale=gradient_scale)
    elif chosen == "native":
        adamw_native(tensors, step=step, gradient_scale=gradient_scale)
    else:
        adamw_reference(tensors, step=step, gradient_scale=gradient_scale)
        return
    note_writes(part for one in tensors for part in (one.parameter, one.first_moment, one.second_moment, one.copy))


def _require(one: AdamWTensors, *, first: torch.Tensor) -> None:
    wide = (torch.float64,) if first.dtype == torch.float64 else (torch.float32,)
    narrow = (*wide, torch.bfloat16)
    parts = [
        ("parameter", one.parameter, wide), ("gradient", one.gradient, narrow),
        ("first_moment", one.first_moment, wide), ("second_moment", one.second_moment, wide),
    ]
    if one.copy is not None:
        parts.append(("copy", one.copy, (torch.bfloat16,)))
    for name, tensor, dtypes in parts:
        require_part(tensor, dtypes=dtypes, shape=one.parameter.shape, first=first, op="adamw", name=name)
