"""The first half of SwiGLU experts: a grouped product, the activation and the rows' weights, one launch by Triton."""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_float, require_fractions, require_offsets, require_shape
from ..dispatch import choose_backend
from ..grouped_gemm import grouped_gemm
from ..swiglu import swiglu
from ..token_rows import RowPlan, require_places, require_plan, spread_rows
from .reference import grouped_swiglu_reference

OFFERED = ("triton", "torch", "reference")
OP = "grouped_swiglu"


def grouped_swiglu(
    rows: torch.Tensor,
    *,
    gate_up: torch.Tensor,
    row_weights: torch.Tensor,
    offsets: torch.Tensor,
    plan: RowPlan | None = None,
    gathers: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return [R, F]: row_weights[r] * silu(gate) * up with gate and up = gate_up[g] rows[r].

    rows [R, D] sorted by group; gate_up [E, 2F, D], gate first, of the same dtype; row_weights [R]; offsets [E]
    integer, cumulative ends, the last at most R. Rows past the last offset give zero and get zero gradients; a group
    without rows gets a zero gradient. With a plan the first argument is tokens [N, D] whose rows the plan names.

    gathers (triton alone): read each row of the plan from its token while multiplying, instead of copying all first.
    By default where the device has no TMA, which reads whole tiles of neighbouring rows (kernels/README.md). Raises
    KernelError for a backend that cannot run, ValueError for shapes and for gathering without a plan of K rows per
    token.
    """
    require_first_product(rows, gate_up=gate_up, row_weights=row_weights, offsets=offsets, plan=plan, op=OP)
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=rows.device, dtype=rows.dtype)
    even = plan is not None and plan.starts is None
    if gathers and not (even and chosen == "triton"):
        raise ValueError(f"{OP}: gathers=True needs backend triton and a plan with equally many rows for each token")
    if chosen == "triton":
        require_float(rows, op=OP, name="rows")
        rule = "it must be contiguous, because the experts' weights are too large to copy"
        require(gate_up.is_contiguous(), op=OP, name="gate_up", tensor=gate_up, rule=rule)
        require(offsets.is_contiguous(), op=OP, name="offsets", tensor=offsets, rule="it must be contiguous")
        from .kernel import gathers_by_default, grouped_swiglu_triton

        sources = places = None
        if even and (gathers_by_default(rows.device) if gathers is None else gathers):
            require_places(plan.places, tokens=rows, sources=plan.sources, op=OP)
            sources, places = plan.sources.contiguous(), plan.places
        elif plan is not None:
            rows = spread_rows(rows, plan=plan, backend=chosen)
        keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (rows, gate_up, row_weights))
        return grouped_swiglu_triton(rows, gate_up, row_weights, offsets, sources, places, keeps)[0]
    if plan is not None:
        rows = spread_rows(rows, plan=plan, backend=chosen)
    if chosen == "reference":
        return grouped_swiglu_reference(rows, gate_up=gate_up, row_weights=row_weights, offsets=offsets)
    first = grouped_gemm(rows, weight=gate_up, offsets=offsets, backend=chosen)
    return swiglu(first, row_weights=row_weights, backend=chosen)


def require_first_product(
    rows: torch.Tensor, *, gate_up: torch.Tensor, row_weights: torch.Tensor, offsets: torch.Tensor,
    plan: RowPlan | None, op: str,
) -> None:
    """Ask that the operands of experts' first product fit each other; rows are tokens where there is a plan."""
    require(rows.ndim == 2, op=op, name="rows", tensor=rows, rule="it must be [rows, width]")
    require_fractions(rows, op=op, name="rows")
    holds = gate_up.ndim == 3 and gate_up.shape[0] > 0 and gate_up.shape[1] % 2 == 0
    holds = holds and gate_up.shape[2] == rows.shape[1]
    rule = "it must be [experts, gate and up, width] with at least one expert and the width of rows"
    require(holds, op=op, name="gate_up", tensor=gate_up, rule=rule)
    require_beside(gate_up, first=rows, op=op, name="gate_up", same_dtype=True)
    count = rows.shape[0] if plan is None else plan.sources.shape[0]
    require_shape(row_weights, shape=(count,), op=op, name="row_weights", meaning="one per row")
    require_fractions(row_weights, op=op, name="row_weights")
    require_beside(row_weights, first=rows, op=op, name="row_weights")
    require_shape(offsets, shape=gate_up.shape[:1], op=op, name="offsets", meaning="one per expert")
    require_beside(offsets, first=rows, op=op, name="offsets")
    require_offsets(offsets, rows=count, op=op)
    if plan is not None:
        require_plan(plan, tokens=rows, op=op)
