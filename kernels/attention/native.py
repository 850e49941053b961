"""Attention by the C++ library: blocks of scores in the cache, online softmax, hidden blocks skipped (fp32, bf16)."""

from __future__ import annotations

import ctypes

import torch

from ..checks import first_order
from ..native.library import is_narrow, native_library, pointer, sizes, threads
from .plan import AttentionPlan, narrow_intervals


class NativeAttention(torch.autograd.Function):
    """Softmax attention under a plan's intervals; a query row that sees nothing gives zero."""

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float
    ) -> torch.Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        intervals = None if plan.intervals is None else narrow_intervals(plan.intervals)
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        native_library().ernie5_attention_forward(
            is_narrow(query),
            *map(pointer, (query, key, value, intervals, out, lse)), *_sizes(query, key), ctypes.c_float(scale),
            threads(),
        )
        ctx.scale, ctx.intervals = scale, intervals
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        grad = grad.contiguous()
        native_library().ernie5_attention_backward(
            is_narrow(query),
            *map(pointer, (query, key, value, ctx.intervals, out, lse, grad, *grads)), *_sizes(query, key),
            ctypes.c_float(ctx.scale), threads(),
        )
        return *grads, None, None


def _sizes(query: torch.Tensor, key: torch.Tensor) -> list[ctypes.c_int64]:
    batch, queries, heads, width = query.shape
    return sizes(batch, queries, key.shape[1], heads, key.shape[2], width)
