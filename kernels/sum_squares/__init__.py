"""The sum of squares of many tensors: what a global gradient norm is made of."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..checks import require_beside, require_fractions
from ..dispatch import choose_backend
from ..native.library import NATIVE_TYPES, addresses, int64s, native_library, threads
from .reference import sum_squares_reference

OFFERED = ("native", "torch", "reference")


def sum_squares(tensors: Sequence[torch.Tensor], *, backend: str = "auto") -> torch.Tensor:
    """Sum over all elements of all `tensors` of x^2, 0-d fp32, or fp64 where the first tensor is; no autograd.

    native sums in fp32 within 16,384 elements and in fp64 over them; torch in the result's dtype. Tensors may
    mix fp32 and bf16. Raises KernelError for a backend that cannot run, ValueError for tensors that do not fit.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    for tensor in tensors:
        require_fractions(tensor, op="sum_squares", name="tensor")
        require_beside(tensor, first=tensors[0], op="sum_squares", name="tensor")
    tensors = [tensor.detach() for tensor in tensors]
    device, wide = tensors[0].device, torch.promote_types(tensors[0].dtype, torch.float32)
    native = all(t.dtype in NATIVE_TYPES and t.device.type == "cpu" for t in tensors) and native_library() is not None
    chosen = choose_backend(backend, op="sum_squares", offered=OFFERED, device=device, native=native)
    if chosen == "reference":
        return sum_squares_reference(tensors).to(wide)
    if chosen == "torch":
        return torch.stack(torch._foreach_norm([tensor.to(wide) for tensor in tensors])).square().sum()
    kept = [tensor.contiguous() for tensor in tensors]
    total = native_library().ernie5_sum_squares(
        ctypes.c_int64(len(kept)), int64s(t.numel() for t in kept),
        (ctypes.c_int * len(kept))(*(t.dtype == torch.bfloat16 for t in kept)), addresses(kept), threads(),
    )
    return torch.tensor(total, dtype=torch.float32, device=device)
