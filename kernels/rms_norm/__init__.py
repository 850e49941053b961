"""RMSNorm over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from ..checks import require_beside, require_float
from ..dispatch import choose_backend
from ..native.library import runs_native
from .fused import FusedRMSNorm
from .native import NativeRMSNorm
from .reference import rms_norm_reference

OFFERED = ("triton", "native", "torch", "reference")


def rms_norm(x: torch.Tensor, *, weight: torch.Tensor, eps: float, backend: str = "auto") -> torch.Tensor:
    """Normalise x [..., D] by its root mean square and scale by weight [D]; accumulates in at least fp32.

    Returns [..., D] in x's dtype. Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    native = runs_native(x, weight)
    chosen = choose_backend(
        backend, op="rms_norm", offered=OFFERED, device=x.device, dtype=x.dtype, native=native
    )
    if chosen == "reference":
        return rms_norm_reference(x, weight=weight, eps=eps)
    if chosen == "native":
        return NativeRMSNorm.apply(x, weight, eps)
    if chosen == "triton":
        from .kernel import rms_norm_triton

        require_float(x, op="rms_norm", name="x")
        require_beside(weight, first=x, op="rms_norm", name="weight")
        return rms_norm_triton(x, weight=weight, eps=eps)
    return FusedRMSNorm.apply(x, weight, eps)
