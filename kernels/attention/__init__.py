"""Softmax attention whose mask is a set of row intervals per key column (FlashMask, arXiv:2410.01359)."""

from __future__ import annotations

import torch

from ernie5.errors import KernelError

from ..checks import require, require_beside, require_float
from ..dispatch import choose_backend
from ..native.library import runs_native
from .chunked import ChunkedAttention, attend, attend_backward
from .native import NativeAttention
from .plan import AttentionPlan, plan_attention, plan_piecewise
from .reference import attention_reference, dense_mask
from .sdpa import attention_sdpa

OFFERED = ("triton", "native", "torch", "sdpa", "flex", "flash_attn", "reference")

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
    chosen = choose_backend(
        backend, op="attention", offered=OFFERED, device=query.device, dtype=query.dtype, native=native
    )
    if chosen == "triton":
        from .operator import attention_triton

        _require(query, key=key, value=value, plan=plan)
        return attention_triton(
            query, key=key, value=value, intervals=plan.intervals, query_start=plan.query_start, scale=scale
        )
    if chosen == "native":
        return NativeAttention.apply(query, key, value, plan, scale)
    if chosen == "sdpa":
        return attention_sdpa(query, key=key, value=value, plan=plan, scale=scale)
    if chosen == "flash_attn":
        return _by_flash_attn(query, key=key, value=value, plan=plan, scale=scale)
    if chosen == "flex":
        from .flex import attention_flex

        return attention_flex(query, key=key, value=value, plan=plan, scale=scale)
    if chosen == "reference":
        if plan.intervals is None:
            mask = torch.ones(query.shape[0], query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
        else:
            mask = dense_mask(plan.intervals, query_start=plan.query_start, query_tokens=query.shape[1])
        return attention_reference(query, key=key, value=value, mask=mask, scale=scale)
    return ChunkedAttention.apply(query, key, value, plan, scale)


def _by_flash_attn(
    query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    if plan.intervals is not None:
        raise KernelError(
            "kernel attention: flash_attn knows causal and full masks, and this plan has row intervals (packed "
            "documents, bidirectional blocks). Use triton, flex or auto"
        )
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value, softmax_scale=scale)


def _require(query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan) -> None:
    require_float(query, op="attention", name="query")
    for name, tensor in (("key", key), ("value", value)):
        require_beside(tensor, first=query, op="attention", name=name, same_dtype=True)
    rule = "heads may be at most 256 wide, a block is held in registers; use backend torch"
    require(query.shape[-1] <= 256, op="attention", name="query", tensor=query, rule=rule)
    if plan.intervals is not None:
        rule = f"it must be [{query.shape[0]}, {key.shape[1]}, 4], one per key column"
        holds = plan.intervals.shape == (query.shape[0], key.shape[1], 4)
        require(holds, op="attention", name="plan.intervals", tensor=plan.intervals, rule=rule)
        require_beside(plan.intervals, first=query, op="attention", name="plan.intervals")
