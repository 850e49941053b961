"""All SwiGLU experts of a mixture-of-experts layer over rows grouped by expert (SPEC section 1)."""

from __future__ import annotations

import torch

from ..dispatch import choose_backend
from ..grouped_gemm import grouped_gemm
from ..native.library import runs_native
from ..swiglu import swiglu
from .native import NativeExperts
from .reference import experts_reference

OFFERED = ("triton", "native", "torch", "megablocks", "reference")


def experts(
    rows: torch.Tensor,
    *,
    row_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    backend: str = "auto",
    fp8: bool = False,
) -> torch.Tensor:
    """Return [R, D]: out[r] = row_weights[r] * down[g] (silu(gate) * up), gate and up = gate_up[g] rows[r].

    rows [R, D] sorted by expert; row_weights [R]; gate_up [E, 2F, D], gate first; down [E, D, F]; offsets [E] integer,
    cumulative ends, the last at most R. Rows past the last offset give zero and get zero gradients; an expert without
    rows gets zero gradients. fp8: both products in e4m3 (see `grouped_gemm`), by Triton alone.

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    num_experts, twice, width = gate_up.shape
    if (
        rows.ndim != 2 or rows.shape[1] != width or down.shape != (num_experts, width, twice // 2) or twice % 2
        or offsets.shape != (num_experts,) or row_weights.shape != rows.shape[:1]
    ):
        raise ValueError(
            f"experts: rows {tuple(rows.shape)}, row_weights {tuple(row_weights.shape)}, gate_up "
            f"{tuple(gate_up.shape)}, down {tuple(down.shape)}, offsets {tuple(offsets.shape)}"
        )
    native = runs_native(rows, gate_up, down)
    offered = OFFERED[:1] if fp8 else OFFERED
    backend = "triton" if fp8 and backend == "auto" else backend  # the only one, so that its absence is said
    chosen = choose_backend(backend, op="experts", offered=offered, device=rows.device, dtype=rows.dtype, native=native)
    if chosen == "reference":
        return experts_reference(rows, row_weights=row_weights, gate_up=gate_up, down=down, offsets=offsets)
    if chosen == "native":
        return NativeExperts.apply(rows, row_weights, gate_up, down, offsets)
    first = grouped_gemm(rows, weight=gate_up, offsets=offsets, backend=chosen, fp8=fp8)
    activated = swiglu(first, row_weights=row_weights, backend="auto" if chosen == "megablocks" else chosen)
    return grouped_gemm(activated, weight=down, offsets=offsets, backend=chosen, fp8=fp8)
