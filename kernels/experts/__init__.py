"""All SwiGLU experts of a mixture-of-experts layer over rows grouped by expert, or over tokens (SPEC section 1)."""

from __future__ import annotations

import torch

from ..checks import require_beside, require_shape
from ..dispatch import PACKAGES, choose_backend
from ..grouped_gemm import grouped_gemm
from ..grouped_swiglu import grouped_swiglu, require_first_product
from ..native.library import runs_native
from ..swiglu import swiglu
from ..token_rows import RowPlan, collect_rows, spread_rows
from .native import NativeExperts
from .reference import experts_reference

OFFERED = ("triton", "native", "torch", "megablocks", "reference")
OFFERED_FP8 = ("triton", "deepgemm")
OP = "experts"


def experts(
    rows: torch.Tensor,
    *,
    row_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    offsets: torch.Tensor,
    plan: RowPlan | None = None,
    backend: str = "auto",
    fp8: bool = False,
) -> torch.Tensor:
    """Return [R, D]: out[r] = row_weights[r] * down[g] (silu(gate) * up), gate and up = gate_up[g] rows[r].

    rows [R, D] sorted by expert; row_weights [R]; gate_up [E, 2F, D], gate first; down [E, D, F]; offsets [E] integer,
    cumulative ends, the last at most R. Rows past the last offset give zero and get zero gradients; an expert without
    rows gets zero gradients. fp8: both products in e4m3 (see `grouped_gemm`), by Triton or, by name, DeepGEMM.

    With a plan the first argument is tokens [N, D] whose rows the plan names, and what is returned the sum of each
    token's rows [N, D]; C++ then makes no tensor of the rows that go in.

    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    _require(rows, plan=plan, row_weights=row_weights, gate_up=gate_up, down=down, offsets=offsets)
    native = runs_native(rows, gate_up, down)
    offered = OFFERED_FP8 if fp8 else OFFERED
    backend = "triton" if fp8 and backend == "auto" else backend  # ours, so that its absence is said
    chosen = choose_backend(backend, op=OP, offered=offered, device=rows.device, dtype=rows.dtype, native=native)
    if chosen == "native":
        return NativeExperts.apply(rows, row_weights, gate_up, down, offsets, plan)
    moves = "auto" if chosen in PACKAGES else chosen
    if chosen == "triton" and not fp8:  # it spreads the tokens by itself, or reads them from where they are
        activated = grouped_swiglu(
            rows, gate_up=gate_up, row_weights=row_weights, offsets=offsets, plan=plan, backend=chosen
        )
    else:
        rows = rows if plan is None else spread_rows(rows, plan=plan, backend=moves)
        if chosen == "reference":
            out = experts_reference(rows, row_weights=row_weights, gate_up=gate_up, down=down, offsets=offsets)
            return out if plan is None else collect_rows(out, plan=plan, backend=moves)
        first = grouped_gemm(rows, weight=gate_up, offsets=offsets, backend=chosen, fp8=fp8)
        activated = swiglu(first, row_weights=row_weights, backend=moves)
    out = grouped_gemm(activated, weight=down, offsets=offsets, backend=chosen, fp8=fp8)
    return out if plan is None else collect_rows(out, plan=plan, backend=moves)


def _require(
    rows: torch.Tensor, *, plan: RowPlan | None, row_weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    require_first_product(rows, gate_up=gate_up, row_weights=row_weights, offsets=offsets, plan=plan, op=OP)
    num_experts, twice, width = gate_up.shape
    shape = (num_experts, width, twice // 2)
    require_shape(down, shape=shape, op=OP, name="down", meaning="as many experts and columns as gate_up")
    require_beside(down, first=rows, op=OP, name="down", same_dtype=True)
