"""SwiGLU activation over a fused gate-and-up projection (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_float, require_fractions, require_shape
from ..dispatch import choose_backend
from ..native.library import runs_native
from .fused import FusedSwiGLU
from .native import NativeSwiGLU
from .reference import swiglu_reference

OFFERED = ("triton", "native", "torch", "reference")
OP = "swiglu"


def swiglu(
    gate_up: torch.Tensor, *, row_weights: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Return silu(gate) * up [..., F] for gate_up [..., 2F] (gate first), times row_weights [...] where given.

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    holds = gate_up.ndim > 0 and gate_up.shape[-1] % 2 == 0
    require(holds, op=OP, name="gate_up", tensor=gate_up, rule="its last dimension must be gate and up, an even number")
    require_fractions(gate_up, op=OP, name="gate_up")
    if row_weights is not None:
        shape = gate_up.shape[:-1]
        require_shape(row_weights, shape=shape, op=OP, name="row_weights", meaning="one per row of gate_up")
        require_fractions(row_weights, op=OP, name="row_weights")
        require_beside(row_weights, first=gate_up, op=OP, name="row_weights")
    native = runs_native(gate_up)
    chosen = choose_backend(
        backend, op=OP, offered=OFFERED, device=gate_up.device, dtype=gate_up.dtype, native=native
    )
    if chosen == "reference":
        return swiglu_reference(gate_up, row_weights=row_weights)
    if chosen == "native":
        return NativeSwiGLU.apply(gate_up, row_weights)
    if chosen == "triton":
        from .kernel import swiglu_triton

        require_float(gate_up, op=OP, name="gate_up")
        return swiglu_triton(gate_up, row_weights)
    return FusedSwiGLU.apply(gate_up, row_weights)
