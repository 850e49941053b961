"""SwiGLU activation over a fused gate-and-up projection (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch

from ..checks import require_beside, require_float
from ..dispatch import choose_backend
from ..native.library import runs_native
from .fused import FusedSwiGLU
from .native import NativeSwiGLU
from .reference import swiglu_reference

OFFERED = ("triton", "native", "torch", "reference")


def swiglu(
    gate_up: torch.Tensor, *, row_weights: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Return silu(gate) * up [..., F] for gate_up [..., 2F] (gate first), times row_weights [...] where given.

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    if gate_up.shape[-1] % 2 or (row_weights is not None and row_weights.shape != gate_up.shape[:-1]):
        raise ValueError(f"swiglu: gate_up {tuple(gate_up.shape)} needs an even last dim and one weight per row")
    native = runs_native(gate_up)
    chosen = choose_backend(
        backend, op="swiglu", offered=OFFERED, device=gate_up.device, dtype=gate_up.dtype, native=native
    )
    if chosen == "reference":
        return swiglu_reference(gate_up, row_weights=row_weights)
    if chosen == "native":
        return NativeSwiGLU.apply(gate_up, row_weights)
    if chosen == "triton":
        from .kernel import swiglu_triton

        require_float(gate_up, op="swiglu", name="gate_up")
        if row_weights is not None:
            require_beside(row_weights, first=gate_up, op="swiglu", name="row_weights")
        return swiglu_triton(gate_up, row_weights)
    return FusedSwiGLU.apply(gate_up, row_weights)
