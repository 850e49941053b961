"""All experts by the C++ library: one thread per expert, both products and SwiGLU on rows that stay in its cache."""

from __future__ import annotations

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads
from ..token_rows import RowPlan, sum_places


class NativeExperts(torch.autograd.Function):
    """See `experts`. Keeps rows (with a plan: tokens) and the first product; backward makes SwiGLU again."""

    @staticmethod
    def forward(
        ctx,
        rows: torch.Tensor,
        row_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        offsets: torch.Tensor,
        plan: RowPlan | None,
    ) -> torch.Tensor:
        rows, gate_up, down = rows.contiguous(), gate_up.contiguous(), down.contiguous()
        ctx.weights_dtype = row_weights.dtype
        row_weights, offsets = row_weights.float().resolve_neg().contiguous(), offsets.long().contiguous()
        sources = None if plan is None else plan.sources.contiguous()
        count = row_weights.shape[0]
        middle, out = rows.new_empty(count, gate_up.shape[1]), rows.new_empty(count, rows.shape[1])
        native_library().ernie5_experts_forward(
            is_narrow(rows), *map(pointer, (rows, sources, row_weights, offsets, gate_up, down, middle, out)),
            *_sizes(count, gate_up), threads(),
        )
        plan_tensors = () if plan is None else plan.tensors
        ctx.save_for_backward(rows, row_weights, gate_up, down, offsets, middle, *plan_tensors)
        return out if plan is None else _sum(out, plan=plan)

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, row_weights, gate_up, down, offsets, middle, *plan_tensors = ctx.saved_tensors
        plan = RowPlan(*plan_tensors, checks=False) if plan_tensors else None
        sources = None if plan is None else plan.sources.contiguous()
        grad, count = grad.contiguous(), row_weights.shape[0]
        grads = [rows.new_empty(count, rows.shape[1]), *map(torch.empty_like, (row_weights, gate_up, down))]
        native_library().ernie5_experts_backward(
            is_narrow(rows),
            *map(pointer, (rows, sources, row_weights, offsets, gate_up, down, middle, grad, *grads)),
            *_sizes(count, gate_up), threads(),
        )
        grads[0] = grads[0] if plan is None else _sum(grads[0], plan=plan)
        grads[1] = grads[1].to(ctx.weights_dtype)
        return *grads, None, None


def _sum(rows: torch.Tensor, *, plan: RowPlan) -> torch.Tensor:
    return sum_places(rows, places=plan.places, starts=plan.starts, backend="native")


def _sizes(rows: int, gate_up: torch.Tensor) -> list:
    experts, twice, width = gate_up.shape
    return sizes(rows, width, twice // 2, experts)
