"""Softmax attention whose mask is a set of row intervals per key column (FlashMask, arXiv:2410.01359)."""

from __future__ import annotations

import torch

from ..dispatch import choose_backend
from ..native.library import runs_native
from .chunked import ChunkedAttention, attend, attend_backward
from .native import NativeAttention
from .plan import AttentionPlan, plan_attention, plan_piecewise
from .reference import attention_reference, dense_mask

OFFERED = ("native", "torch", "reference")

__all__ = [
    "AttentionPlan", "attend", "attend_backward", "attention", "dense_mask", "plan_attention", "plan_piecewise",
]


def attention(
    query: torch.Tensor,
    *,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend from query [B, T, H, C] to key and value [B, S, G, C] (G divides H) as `plan` allows.

    Softmax in at least fp32; a row that sees no key gives zero. scale defaults to C^-1/2. Returns [B, T, H, C].
    Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    if key.shape != value.shape or query.shape[2] % key.shape[2] or query.shape[1] != plan.query_tokens:
        raise ValueError(
            f"attention: query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, plan for "
            f"{plan.query_tokens} queries"
        )
    if key.shape[1] != plan.query_start + plan.query_tokens:
        raise ValueError(f"attention: {key.shape[1]} keys, plan for {plan.query_start + plan.query_tokens}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    native = runs_native(query, key, value) and query.shape[-1] % 2 == 0
    chosen = choose_backend(backend, op="attention", offered=OFFERED, device=query.device, native=native)
    if chosen == "native":
        return NativeAttention.apply(query, key, value, plan, scale)
    if chosen == "reference":
        if plan.intervals is None:
            mask = torch.ones(query.shape[0], query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
        else:
            mask = dense_mask(plan.intervals, query_start=plan.query_start, query_tokens=query.shape[1])
        return attention_reference(query, key=key, value=value, mask=mask, scale=scale)
    return ChunkedAttention.apply(query, key, value, plan, scale)
