"""RMSNorm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_float, require_fractions, require_shape
from ..dispatch import choose_backend
from ..native.library import runs_native
from .fused import FusedRMSNorm
from .native import NativeRMSNorm
from .reference import rms_norm_reference

OFFERED = ("triton", "native", "torch", "reference")
OP = "rms_norm"


def rms_norm(x: torch.Tensor, *, weight: torch.Tensor, eps: float, backend: str = "auto") -> torch.Tensor:
    """Normalise x [..., D] by its root mean square and scale by weight [D]; accumulates in at least fp32.

    Returns [..., D] in x's dtype. Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    rule = "it must be [..., width] with a width of at least 1"
    require(x.ndim > 0 and x.shape[-1] > 0, op=OP, name="x", tensor=x, rule=rule)
    require_fractions(x, op=OP, name="x")
    require_shape(weight, shape=x.shape[-1:], op=OP, name="weight", meaning="one per column of x")
    require_fractions(weight, op=OP, name="weight")
    require_beside(weight, first=x, op=OP, name="weight")
    native = runs_native(x, weight)
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=x.device, dtype=x.dtype, native=native)
    if chosen == "reference":
        return rms_norm_reference(x, weight=weight, eps=eps)
    if chosen == "native":
        return NativeRMSNorm.apply(x, weight, eps)
    if chosen == "triton":
        from .kernel import rms_norm_triton

        require_float(x, op=OP, name="x")
        return rms_norm_triton(x, weight=weight, eps=eps)
    return FusedRMSNorm.apply(x, weight, eps)
