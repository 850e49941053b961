"""A linear map without bias."""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_fractions
from ..dispatch import choose_backend
from ..native.library import has_tiles, runs_native
from .native import NativeLinear
from .reference import linear_reference

OFFERED = ("native", "torch", "reference")
OP = "linear"


def linear(x: torch.Tensor, *, weight: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Return x [..., K] times weight [N, K] transposed, [..., N], summed in fp32 for bf16.

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    require(x.ndim > 0, op=OP, name="x", tensor=x, rule="it must be [..., inputs]")
    require_fractions(x, op=OP, name="x")
    holds = weight.ndim == 2 and weight.shape[1] == x.shape[-1]
    require(holds, op=OP, name="weight", tensor=weight, rule="it must be [outputs, inputs] with the inputs of x")
    require_beside(weight, first=x, op=OP, name="weight", same_dtype=True)
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=x.device, native=runs_native(x, weight))
    if chosen == "reference":
        return linear_reference(x, weight=weight)
    if chosen == "native" and (backend == "native" or not has_tiles(x)):  # oneDNN's matrix tiles are faster than ours
        return NativeLinear.apply(x, weight)
    return torch.nn.functional.linear(x, weight)
