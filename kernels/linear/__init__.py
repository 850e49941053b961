"""A linear map without bias."""

from __future__ import annotations

import torch

from ..dispatch import choose_backend
from ..native.library import has_tiles, runs_native
from .native import NativeLinear
from .reference import linear_reference

OFFERED = ("native", "torch", "reference")


def linear(x: torch.Tensor, *, weight: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Return x [..., K] times weight [N, K] transposed, [..., N], summed in fp32 for bf16.

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    chosen = choose_backend(backend, op="linear", offered=OFFERED, device=x.device, native=runs_native(x, weight))
    if chosen == "reference":
        return linear_reference(x, weight=weight)
    if chosen == "native" and (backend == "native" or not has_tiles(x)):  # oneDNN's matrix tiles are faster than ours
        return NativeLinear.apply(x, weight)
    return torch.nn.functional.linear(x, weight)
