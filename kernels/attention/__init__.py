"""Softmax attention whose mask is a set of row intervals per key column (FlashMask, arXiv:2410.01359)."""

from __future__ import annotations

import math

import torch

from ernie5.errors import KernelError

from ..checks import require, require_beside, require_float, require_fractions, require_shape
from ..dispatch import choose_backend
from ..native.library import runs_native
from .chunked import ChunkedAttention, attend, attend_backward
from .native import NativeAttention
from .plan import AttentionPlan, plan_attention, plan_piecewise
from .reference import attention_reference, dense_mask
from .sdpa import attention_sdpa

OFFERED = ("triton", "native", "torch", "sdpa", "flex", "flash_attn", "reference")
OP = "attention"

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
    _require(query, key=key, value=value, plan=plan)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"attention: scale is {scale}; it must be a finite number")
    is_even = query.shape[-1] % 2 == 0
    rule = "native takes heads of an even width; use auto or torch"
    require(is_even or backend != "native", op=OP, name="query", tensor=query, rule=rule)
    native = runs_native(query, key, value) and is_even
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=query.device, dtype=query.dtype, native=native)
    if chosen in ("triton", "native") and scale <= 0:  # they take the largest score before they scale
        query, scale = query * (-1.0 if scale < 0 else 0.0), -scale or 1.0
    if chosen == "triton":
        from .operator import attention_triton

        require_float(query, op=OP, name="query")
        rule = "heads may be at most 256 wide, a block is held in registers; use backend torch"
        require(query.shape[-1] <= 256, op=OP, name="query", tensor=query, rule=rule)
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
    holds = query.ndim == 4 and query.shape[3] > 0
    rule = "it must be [rows, queries, heads, width] with a width of at least 1"
    require(holds, op=OP, name="query", tensor=query, rule=rule)
    require_fractions(query, op=OP, name="query")
    if plan.is_piecewise:
        raise ValueError("attention: the plan is of plan_piecewise, its queries are several runs; call attend with it")
    batch, queries, heads, width = query.shape
    if queries != plan.query_tokens:
        rule = f"it does not fit a plan for {plan.query_tokens} queries"
        require(False, op=OP, name="query", tensor=query, rule=rule)
    keys = plan.query_start + plan.query_tokens
    holds = key.ndim == 4 and key.shape[2] > 0 and heads % key.shape[2] == 0
    if not holds or (key.shape[0], key.shape[1], key.shape[3]) != (batch, keys, width):
        rule = f"it must be [{batch}, {keys}, key heads, {width}] as the plan and query say, key heads dividing {heads}"
        require(False, op=OP, name="key", tensor=key, rule=rule)
    require_shape(value, shape=key.shape, op=OP, name="value", meaning="as key")
    require_beside(key, first=query, op=OP, name="key", same_dtype=True)
    require_beside(value, first=query, op=OP, name="value", same_dtype=True)
    if plan.intervals is not None:
        name = "plan.intervals"
        require_shape(plan.intervals, shape=(batch, keys, 4), op=OP, name=name, meaning="four rows per key column")
        holds = not plan.intervals.is_floating_point()
        require(holds, op=OP, name=name, tensor=plan.intervals, rule="it must be of integers")
        require_beside(plan.intervals, first=query, op=OP, name=name)
