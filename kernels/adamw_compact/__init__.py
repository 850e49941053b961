"""AdamW with less state: moments of 8 bits, and bf16 weights without fp32 masters, rounded at random."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adamw.reference import AdamWStep
from ..checks import note_writes, require, require_beside, require_part
from ..dispatch import choose_backend
from ..native.library import native_library
from .native import adamw_compact_native
from .reference import CompactTensors, Moment, adamw_compact_reference, count_blocks

OFFERED = ("triton", "native", "reference")
OP = "adamw_compact"

__all__ = ["AdamWStep", "CompactTensors", "Moment", "adamw_compact", "count_blocks"]


def adamw_compact(
    tensors: Sequence[CompactTensors],
    *,
    step: AdamWStep,
    gradient_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Update parameters, moments and copies in place.

    gradient_scale: one fp32 number on the device, such as a clipping factor, so that no host needs to know it. A
    parameter is bf16 or fp32, its gradient either, a copy bf16 and beside an fp32 parameter alone; all contiguous.
    Equal seeds and steps give equal bits, whatever the number of threads or the tensors beside. Raises KernelError for
    a backend that cannot run, ValueError for tensors that do not fit.
    """
    if not tensors:
        return
    first = tensors[0].parameter
    for one in tensors:
        _require(one, first=first)
    if gradient_scale is not None:
        holds = gradient_scale.numel() == 1 and gradient_scale.dtype == torch.float32
        rule = "it must be one number of float32"
        require(holds, op=OP, name="gradient_scale", tensor=gradient_scale, rule=rule)
        require_beside(gradient_scale, first=first, op=OP, name="gradient_scale")
    native = first.device.type == "cpu" and native_library() is not None
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=first.device, native=native)
    if chosen == "triton":
        from .kernel import adamw_compact_triton

        adamw_compact_triton(tensors, step=step, gradient_scale=gradient_scale)
    else:
        run = adamw_compact_native if chosen == "native" else adamw_compact_reference
        for one in tensors:
            run(one, step=step, gradient_scale=gradient_scale)
    note_writes(part for one in tensors for part in (one.parameter, one.first.values, one.second.values, one.copy))


def _require(one: CompactTensors, *, first: torch.Tensor) -> None:
    parameter, either = one.parameter, (torch.float32, torch.bfloat16)
    state = (torch.float32,) if one.first.scales is None else (torch.uint8,)
    parts = [
        ("parameter", parameter, either), ("gradient", one.gradient, either),
        ("first moment", one.first.values, state), ("second moment", one.second.values, state),
    ]
    if one.copy is not None:
        holds = parameter.dtype == torch.float32
        require(holds, op=OP, name="parameter", tensor=parameter, rule="only float32 has a copy in bfloat16")
        parts.append(("copy", one.copy, (torch.bfloat16,)))
    for name, tensor, dtypes in parts:
        require_part(tensor, dtypes=dtypes, shape=parameter.shape, first=first, op=OP, name=name)
    if (one.first.scales is None) != (one.second.scales is None):
        raise ValueError("adamw_compact: one moment has scales and the other has none; both are codes, or neither")
    for name, scales in (("first scales", one.first.scales), ("second scales", one.second.scales)):
        if scales is not None:
            blocks = count_blocks(parameter.numel())
            holds = scales.shape == (blocks,) and scales.dtype == torch.float32 and scales.is_contiguous()
            if not holds:
                require(False, op=OP, name=name, tensor=scales, rule=f"it must be [{blocks}] of float32")
            require_beside(scales, first=first, op=OP, name=name)
