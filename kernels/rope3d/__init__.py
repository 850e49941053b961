"""Rotary position embedding, interleaved pairs (0,1),(2,3).. (Su et al. 2021, arXiv:2104.09864).

The caller computes the angles once per batch from (t, h, w); this op only turns pairs, as one complex product.
"""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_float, require_fractions, require_shape
from ..dispatch import choose_backend
from ..native.library import runs_native
from .native import NativeRotation
from .reference import rope3d_reference

OFFERED = ("triton", "native", "torch", "reference")
OP = "rope3d"


def rotation_of(angles: torch.Tensor) -> torch.Tensor:
    """Unit complex numbers exp(i angle) for angles [B, T, C/2] (fp32 or fp64), shared by every layer of a batch."""
    return torch.polar(torch.ones_like(angles), angles)


def rope3d(x: torch.Tensor, *, rotation: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Rotate the pairs of x [B, T, H, C] by rotation [B, T, C/2] complex; computes in at least fp32.

    Returns [B, T, H, C] in x's dtype; the rotation gets no gradient. Raises KernelError for a backend that cannot run,
    ValueError for tensors that do not fit.
    """
    holds = x.ndim == 4 and x.shape[3] % 2 == 0
    require(holds, op=OP, name="x", tensor=x, rule="it must be [rows, tokens, heads, width] with an even width")
    require_fractions(x, op=OP, name="x")
    pairs = (*x.shape[:2], x.shape[3] // 2)
    require_shape(rotation, shape=pairs, op=OP, name="rotation", meaning="one per token and pair of x")
    require(rotation.is_complex(), op=OP, name="rotation", tensor=rotation, rule="it must be complex, of rotation_of")
    require_beside(rotation, first=x, op=OP, name="rotation")
    rotation = rotation.resolve_conj().resolve_neg()
    is_narrow = rotation.dtype == torch.complex64
    rule = "native takes complex64; use auto or torch"
    require(is_narrow or backend != "native", op=OP, name="rotation", tensor=rotation, rule=rule)
    native = runs_native(x) and is_narrow
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=x.device, dtype=x.dtype, native=native)
    if chosen == "reference":
        return rope3d_reference(x, angles=rotation.detach().angle())
    if chosen == "native":
        return NativeRotation.apply(x, rotation)
    if chosen == "triton":
        from .kernel import rope3d_triton

        require_float(x, op=OP, name="x")
        return rope3d_triton(x, torch.view_as_real(rotation).float(), 1.0)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.complex(*wide.unflatten(-1, (-1, 2)).unbind(-1))  # a view as complex would want whole pairs of memory
    return torch.view_as_real(pairs * rotation.detach().unsqueeze(2)).flatten(-2).to(x.dtype)
