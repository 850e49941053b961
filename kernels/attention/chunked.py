"""Attention chunk by chunk of a plan with a hand-written backward: O(T * chunk) memory on any device and dtype.

Per chunk, with S = scale Q K^T, P = exp(S - lse) and delta = rowsum(dO * O) (Dao et al. 2022, arXiv:2205.14135):
dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K, dK = scale dS^T Q. Scores are made again in the backward pass.
"""

from __future__ import annotations

import torch

from ..checks import first_order, require
from .plan import AttentionPlan, Chunk


class ChunkedAttention(torch.autograd.Function):
    """Softmax attention under a plan; a query row that sees nothing gives zero."""

    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float
    ) -> torch.Tensor:
        out, lse = attend(query, key=key, value=value, plan=plan, scale=scale, dtype=query.dtype)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        gradients = attend_backward(
            grad, query=query, key=key, value=value, lse=lse, delta=delta, plan=ctx.plan, scale=ctx.scale
        )
        return *(g.to(x.dtype) for g, x in zip(gradients, (query, key, value), strict=True)), None, None


def attend(
    query: torch.Tensor,
    *,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, T, H, C] in `dtype` and log-sum-exp of the scores [B, T, H], at least fp32, +inf for a row that sees
    nothing. The chunks of `plan` must cover every query row once; their keys may be a part of all, so that results
    over several parts can be merged.
    """
    planned = plan.chunks[-1].row + 1 if plan.chunks else 0
    if query.numel() and planned != query.shape[0]:
        rule = f"it does not fit a plan for {planned} rows"
        require(False, op="attention", name="query", tensor=query, rule=rule)
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(query.shape, dtype=dtype)
    lse = query.new_empty(query.shape[:3], dtype=wide)
    for chunk in plan.chunks:
        q, k, v = _folded(query, chunk=chunk, groups=key.shape[2]), *_keys(key, value, chunk=chunk)
        scores = _scores(q, k=k, hidden=plan.hidden_of(chunk), scale=scale, wide=wide)
        peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(wide).min)
        scores.sub_(peak).exp_()
        mass = scores.sum(-1, keepdim=True)
        result = torch.bmm(scores.to(v.dtype), v).to(wide).div_(mass.clamp(min=torch.finfo(wide).tiny))
        _unfold(out, chunk=chunk, groups=key.shape[2]).copy_(_shaped(result, chunk=chunk))
        chunk_lse = peak.add_(mass.log_()).masked_fill_(peak == float("-inf"), float("inf"))
        _unfold(lse.unsqueeze(-1), chunk=chunk, groups=key.shape[2]).copy_(_shaped(chunk_lse, chunk=chunk))
    return out, lse


def attend_backward(
    grad: torch.Tensor,
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query in its dtype, of key and value in at least fp32, from the output's, `lse` and `delta`
    [B, T, H], which belong to the whole row even where the keys are a part of all.
    """
    groups, wide = key.shape[2], lse.dtype
    lse, delta = lse.unsqueeze(-1), delta.unsqueeze(-1)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.zeros(key.shape, dtype=wide, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=wide, device=key.device)
    for chunk in plan.chunks:
        q, k, v = _folded(query, chunk=chunk, groups=groups), *_keys(key, value, chunk=chunk)
        upstream = _folded(grad, chunk=chunk, groups=groups)
        scores = _scores(q, k=k, hidden=plan.hidden_of(chunk), scale=scale, wide=wide)
        scores.sub_(_folded(lse, chunk=chunk, groups=groups)).exp_()
        change = torch.bmm(upstream, v.transpose(1, 2)).to(wide)
        change.sub_(_folded(delta, chunk=chunk, groups=groups)).mul_(scores).mul_(scale)
        change = change.to(query.dtype)
        span = slice(chunk.key_from, chunk.key_until)
        grad_value[chunk.row, span] += torch.bmm(scores.to(v.dtype).transpose(1, 2), upstream).transpose(0, 1)
        grad_key[chunk.row, span] += torch.bmm(change.transpose(1, 2), q).transpose(0, 1)
        _unfold(grad_query, chunk=chunk, groups=groups).copy_(_shaped(torch.bmm(change, k), chunk=chunk))
    return grad_query, grad_key, grad_value


def _scores(
    q: torch.Tensor, *, k: torch.Tensor, hidden: torch.Tensor | None, scale: float, wide: torch.dtype
) -> torch.Tensor:
    scores = torch.bmm(q, k.transpose(1, 2)).to(wide).mul_(scale)
    if hidden is not None:
        scores.view(scores.shape[0], -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    return scores


def _keys(key: torch.Tensor, value: torch.Tensor, *, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    span = slice(chunk.key_from, chunk.key_until)
    return key[chunk.row, span].transpose(0, 1), value[chunk.row, span].transpose(0, 1)


def _unfold(x: torch.Tensor, *, chunk: Chunk, groups: int) -> torch.Tensor:
    """View [G, H/G, queries, C] of a chunk's rows of x [B, T, H, C]: the heads that share a key head side by side."""
    rows = x[chunk.row, chunk.query_from : chunk.query_until]
    return rows.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)


def _folded(x: torch.Tensor, *, chunk: Chunk, groups: int) -> torch.Tensor:
    return _unfold(x, chunk=chunk, groups=groups).flatten(1, 2)


def _shaped(result: torch.Tensor, *, chunk: Chunk) -> torch.Tensor:
    return result.unflatten(1, (-1, chunk.query_until - chunk.query_from))
