"""Products of contiguous groups of rows with one weight each: the arithmetic of mixture-of-experts layers."""

from __future__ import annotations

import torch

from ..checks import (
    fp8_runs_on,
    require,
    require_beside,
    require_float,
    require_fractions,
    require_offsets,
    require_shape,
)
from ..dispatch import choose_backend
from .reference import grouped_gemm_reference
from .segments import SegmentedGemm

OFFERED = ("triton", "torch", "megablocks", "reference")
OFFERED_FP8 = ("triton", "deepgemm")
OP = "grouped_gemm"


def grouped_gemm(
    rows: torch.Tensor, *, weight: torch.Tensor, offsets: torch.Tensor, backend: str = "auto", fp8: bool = False
) -> torch.Tensor:
    """Return y [R, M] with y[r] = weight[g] @ rows[r] for offsets[g-1] <= r < offsets[g].

    rows [R, K] sorted by group; weight [E, M, K] of the same dtype; offsets [E] integer, cumulative ends, the last at
    most R. Rows past the last offset give zero and get a zero gradient; a group without rows gives its weight a zero
    gradient. fp8: multiply in e4m3 with scales per 1 x 128 and 128 x 128 (triton or, by name, deepgemm; the weight's
    gradient keeps the rows' dtype). Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    _require(rows, weight=weight, offsets=offsets)
    offered = OFFERED_FP8 if fp8 else OFFERED
    if fp8 and backend == "auto":
        backend = "triton"  # the only one that is ours, so that its absence is said
    chosen = choose_backend(backend, op=OP, offered=offered, device=rows.device, dtype=rows.dtype)
    if chosen == "reference":
        return grouped_gemm_reference(rows, weight=weight, offsets=offsets)
    if chosen == "megablocks":
        return _by_megablocks(rows, weight=weight, offsets=offsets)
    if chosen == "deepgemm":
        from .deep import DeepGroupedGemm, require_deepgemm

        _require_triton(rows, weight=weight, offsets=offsets)  # whose kernels cast, and multiply for the weight
        require_deepgemm(rows, weight=weight, op=OP)
        return DeepGroupedGemm.apply(rows, weight, offsets)
    if chosen == "triton":
        from .kernel import grouped_gemm_triton

        _require_triton(rows, weight=weight, offsets=offsets)
        if fp8:
            rule = "fp8 products need compute capability 8.9 or later; use fp8=False"
            require(fp8_runs_on(rows.device), op=OP, name="rows", tensor=rows, rule=rule)
            from .scaled import ScaledGroupedGemm

            return ScaledGroupedGemm.apply(rows, weight, offsets)
        return grouped_gemm_triton(rows, weight, offsets, False)
    return SegmentedGemm.apply(rows, weight, offsets)


def _by_megablocks(rows: torch.Tensor, *, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """megablocks' grouped_gemm wants group sizes on the host, so that this waits for the device, and every row used."""
    from grouped_gemm.ops import gmm

    rule = "megablocks multiplies bfloat16 alone; use triton or torch"
    require(rows.dtype == torch.bfloat16, op=OP, name="rows", tensor=rows, rule=rule)
    sizes = torch.diff(offsets, prepend=offsets.new_zeros(1)).to("cpu", torch.int64)
    used = int(sizes.sum())
    out = gmm(rows[:used], weight, sizes, trans_b=True)
    return out if used == rows.shape[0] else torch.cat([out, out.new_zeros(rows.shape[0] - used, out.shape[1])])


def _require(rows: torch.Tensor, *, weight: torch.Tensor, offsets: torch.Tensor) -> None:
    require(rows.ndim == 2, op=OP, name="rows", tensor=rows, rule="it must be [rows, width]")
    require_fractions(rows, op=OP, name="rows")
    holds = weight.ndim == 3 and weight.shape[0] > 0 and weight.shape[2] == rows.shape[1]
    rule = "it must be [groups, outputs, width] with at least one group and the width of rows"
    require(holds, op=OP, name="weight", tensor=weight, rule=rule)
    require_beside(weight, first=rows, op=OP, name="weight", same_dtype=True)
    require_shape(offsets, shape=weight.shape[:1], op=OP, name="offsets", meaning="one per group")
    require_beside(offsets, first=rows, op=OP, name="offsets")
    require_offsets(offsets, rows=rows.shape[0], op=OP)


def _require_triton(rows: torch.Tensor, *, weight: torch.Tensor, offsets: torch.Tensor) -> None:
    require_float(rows, op=OP, name="rows")
    rule = "it must be contiguous, because the experts' weights are too large to copy"
    require(weight.is_contiguous(), op=OP, name="weight", tensor=weight, rule=rule)
    require(offsets.is_contiguous(), op=OP, name="offsets", tensor=offsets, rule="it must be contiguous")
