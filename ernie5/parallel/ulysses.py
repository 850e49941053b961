"""Ulysses attention: tokens are exchanged for heads before attention and back after it (arXiv:2309.14509).

Each rank then has the whole row for H/R heads and runs ordinary attention: four all-to-alls of [B, t, heads, C] per
layer and pass, against R-1 steps of keys and values in a ring. The number of ranks must divide the query heads; key
heads are repeated as often as needed to be divisible as well.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ernie5.errors import LayoutError
from ernie5.parallel.collectives import all_to_all
from ernie5.parallel.state import Axis
from ernie5.parallel.token_split import Splitter
from ernie5_kernels.attention import AttentionPlan, attention, plan_attention


@dataclasses.dataclass(frozen=True)
class UlyssesPlan:
    """whole: attention over the whole row in its natural order; order [S] int64: the row's position of each token as
    the ranks hold them, one rank after another; inverse [S]: the other way round."""

    whole: AttentionPlan
    order: torch.Tensor
    inverse: torch.Tensor


class UlyssesPlanner:
    """Makes the plan of a batch that `cut_batch` has cut."""

    def __init__(self, splitter: Splitter) -> None:
        self._splitter = splitter

    def __call__(
        self, intervals: torch.Tensor, *, batch_rows: int, query_tokens: int, key_tokens: int
    ) -> UlyssesPlan:
        """intervals [B, all_tokens, 4] of every rank's columns; query_tokens: positions of this rank."""
        split = self._splitter.of_part(query_tokens)
        order = torch.cat([split.order(rank) for rank in range(split.ranks)]).to(intervals.device)
        tokens = split.all_tokens
        whole = plan_attention(intervals, batch_rows=batch_rows, query_tokens=tokens, key_tokens=tokens)
        return UlyssesPlan(whole, order, torch.argsort(order))


class UlyssesAttention:
    """The AttentionOp of a rank that holds a part of each row; `backend` is that of the attention kernel."""

    def __init__(self, axis: Axis, *, backend: str) -> None:
        self._axis, self._backend = axis, backend

    def __call__(
        self, query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, plan: UlyssesPlan
    ) -> torch.Tensor:
        """query [B, t, H, C], key and value [B, t, G, C] of this rank's t positions -> [B, t, H, C]; collective."""
        heads, groups = query.shape[2], key.shape[2]
        check_heads(heads, ranks=self._axis.size)
        copies = math.lcm(groups, self._axis.size) // groups
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=2) for x in (key, value))
        parts = (_HeadsForTokens.apply(x, self._axis).index_select(1, plan.inverse) for x in (query, key, value))
        rows, keys, values = parts
        out = attention(rows, key=keys, value=values, plan=plan.whole, backend=self._backend)
        return _TokensForHeads.apply(out.index_select(1, plan.order), self._axis)


def check_heads(heads: int, *, ranks: int) -> None:
    """Raise LayoutError unless `ranks` divides the query heads (of one tensor-parallel rank)."""
    if heads % ranks:
        near = [n for n in range(1, heads + 1) if heads % n == 0]
        raise LayoutError(
            f"parallel.cp = {ranks} does not divide the {heads} query heads of a rank. Ulysses gives every rank whole "
            f"heads. Degrees that work: {', '.join(map(str, near))}; or set parallel.context: ring"
        )


class _HeadsForTokens(torch.autograd.Function):
    """[B, t, H, C] of t tokens and all heads -> [B, R t, H/R, C] of all tokens, rank by rank, and this rank's heads."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return heads_for_tokens(x, axis=axis)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _TokensForHeads.apply(grad, ctx.axis), None


class _TokensForHeads(torch.autograd.Function):
    """The inverse of _HeadsForTokens, which is its adjoint too: both only move numbers."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return tokens_for_heads(x, axis=axis)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _HeadsForTokens.apply(grad, ctx.axis), None


def heads_for_tokens(x: torch.Tensor, *, axis: Axis) -> torch.Tensor:
    """[B, t, H, C] -> [B, R t, H/R, C]; collective."""
    sent = x.unflatten(2, (axis.size, -1)).permute(2, 0, 1, 3, 4).contiguous()
    found = _exchange(sent, axis=axis)
    return found.transpose(0, 1).flatten(1, 2)


def tokens_for_heads(x: torch.Tensor, *, axis: Axis) -> torch.Tensor:
    """[B, R t, H/R, C] -> [B, t, H, C]; collective."""
    sent = x.unflatten(1, (axis.size, -1)).transpose(0, 1).contiguous()
    found = _exchange(sent, axis=axis)
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchange(x: torch.Tensor, *, axis: Axis) -> torch.Tensor:
    """x [R, ...]: part i goes to rank i, part i of the result comes from it."""
    return all_to_all(x, axis=axis, send=[1] * axis.size, receive=[1] * axis.size, what="ulysses")
