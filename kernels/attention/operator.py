"""Launches of the Triton attention, registered as operators with fake versions and gradients."""

from __future__ import annotations

import math

import torch

from ..grouped_gemm.kernel import precision_of
from ..launch import capability_of, ceil_div, power_of_two, readable
from .blocks import block_lists, everything_visible, summarise_keys
from .kernel import (
    AttentionBlocks,
    attention_forward_kernel,
    choose_blocks,
    delta_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from .plan import narrow_intervals

SMALLEST_WIDTH = 16
DELTA_ROWS = 16


@torch.library.custom_op("ernie5::attention", mutates_args=())
def attention_op(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, intervals: torch.Tensor, query_start: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, T, H, C], log-sum-exp [B, H, T] fp32 to base 2, +inf for a row that sees nothing)."""
    query, key, value = (readable(x) for x in (query, key, value))
    batch, queries, heads, width = query.shape
    out, lse = _results(query)
    if not out.numel():
        return out, lse
    blocks = _blocks(query, part="forward")
    by_query = block_lists(
        summarise_keys(intervals, block_keys=blocks.keys), queries=queries, query_start=query_start,
        block_queries=blocks.queries, by_query=True,
    )
    attention_forward_kernel[(by_query.others.shape[1], heads, batch)](
        query, key, value, out, lse, intervals, by_query.others, by_query.counts, queries, key.shape[1], query_start,
        heads, key.shape[2], width, scale * math.log2(math.e), *query.stride()[:3], *key.stride()[:3],
        *value.stride()[:3], by_query.others.shape[2], precision_of(query.dtype), blocks.queries, blocks.keys,
        power_of_two(width, least=SMALLEST_WIDTH), num_warps=blocks.warps, num_stages=blocks.stages,
    )
    return out, lse


@torch.library.custom_op("ernie5::attention_backward", mutates_args=())
def attention_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, intervals: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, grad: torch.Tensor, query_start: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value."""
    query, key, value, grad = (readable(x) for x in (query, key, value, grad.contiguous()))
    batch, queries, heads, width = query.shape
    grads = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    if not out.numel():
        return grads[0], grads[1].zero_(), grads[2].zero_()
    padded, delta = power_of_two(width, least=SMALLEST_WIDTH), torch.empty_like(lse)
    rows = batch * queries * heads
    delta_kernel[(ceil_div(rows, DELTA_ROWS),)](
        grad, out, delta, rows, queries, heads, width, DELTA_ROWS, padded, num_warps=4
    )
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    sizes = (
        queries, key.shape[1], query_start, heads, key.shape[2], width, scale * math.log2(math.e), scale, *strides
    )
    precision = precision_of(query.dtype)
    rows_seen = {"queries": queries, "query_start": query_start}
    by_keys, by_queries = _blocks(query, part="keys"), _blocks(query, part="queries")
    summary = summarise_keys(intervals, block_keys=by_keys.keys)
    seen = block_lists(summary, **rows_seen, block_queries=by_keys.queries, by_query=False)
    key_gradient_kernel[(seen.others.shape[1], key.shape[2], batch)](
        query, key, value, grad, lse, delta, grads[1], grads[2], intervals, seen.others, seen.counts, *sizes,
        seen.others.shape[2], precision, by_keys.queries, by_keys.keys, padded,
        num_warps=by_keys.warps, num_stages=by_keys.stages,
    )
    if by_queries.keys != by_keys.keys:
        summary = summarise_keys(intervals, block_keys=by_queries.keys)
    seen = block_lists(summary, **rows_seen, block_queries=by_queries.queries, by_query=True)
    query_gradient_kernel[(seen.others.shape[1], heads, batch)](
        query, key, value, grad, lse, delta, grads[0], intervals, seen.others, seen.counts, *sizes,
        seen.others.shape[2], precision, by_queries.queries, by_queries.keys, padded,
        num_warps=by_queries.warps, num_stages=by_queries.stages,
    )
    return grads


def _results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, width = query.shape
    return query.new_empty(batch, queries, heads, width), query.new_empty((batch, heads, queries), dtype=torch.float32)


def _blocks(query: torch.Tensor, *, part: str) -> AttentionBlocks:
    return choose_blocks(
        capability=capability_of(query.device), width=query.shape[-1], element_bytes=query.element_size(), part=part
    )


@attention_op.register_fake
def _fake_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, intervals: torch.Tensor, query_start: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(query)


@attention_backward.register_fake
def _fake_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, intervals: torch.Tensor, out: torch.Tensor,
    lse: torch.Tensor, grad: torch.Tensor, query_start: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save(ctx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.query_start, ctx.scale = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return *attention_backward(*ctx.saved_tensors, grad, ctx.query_start, ctx.scale), None, None, None


attention_op.register_autograd(_gradients, setup_context=_save)


def attention_triton(
    query: torch.Tensor,
    *,
    key: torch.Tensor,
    value: torch.Tensor,
    intervals: torch.Tensor | None,
    query_start: int,
    scale: float,
) -> torch.Tensor:
    """Attend from query [B, T, H, C] to key and value [B, S, G, C] under intervals [B, S, 4] (None: to all); scale > 0.
    """
    if intervals is None:
        intervals = everything_visible(batch=query.shape[0], keys=key.shape[1], device=query.device)
    return attention_op(query, key, value, narrow_intervals(intervals), query_start, scale)[0]
