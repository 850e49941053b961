"""Collectives with gradients. Each takes an Axis and does nothing on an axis of one rank.

| function | forward | gradient | when |
|---|---|---|---|
| copy_to | same tensor | sum over ranks | a replicated input enters work that is cut over the axis |
| reduce_from | sum over ranks | same tensor | partial results leave that work; afterwards replicated |
| split | this rank's part | parts of all ranks | a replicated tensor becomes cut |
| gather | parts of all ranks | this rank's part | a cut tensor becomes whole; all ranks go on alike |
| gather_for_work | parts of all ranks | sum over ranks, own part | what is cut enters work that differs by rank |
| reduce_scatter | sum over ranks, this rank's part | parts of all ranks | partial results leave it; afterwards cut |
| exchange_rows | uneven all-to-all | the reverse all-to-all | rows travel (`exchange`: beside other work) |

The gradient of each is another one of them, called as such, so that gradients have gradients. Parts may differ in
length: `sizes` lists them in order of ranks. Sums of parts run in order of ranks, so that they are the same at every
repetition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ernie5.parallel.state import Axis


def all_reduce(x: torch.Tensor, *, axis: Axis) -> torch.Tensor:
    """Sum over the ranks of `axis`, out of place and without gradient."""
    if axis.size == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=axis.group)
    axis.traffic.add(axis.name, num_bytes=2 * x.numel() * x.element_size() * (axis.size - 1) // axis.size)
    return x


def all_to_all(
    x: torch.Tensor, *, axis: Axis, send: Sequence[int], receive: Sequence[int], what: str = ""
) -> torch.Tensor:
    """x [sum(send), ...], send[i] rows for rank i -> [sum(receive), ...] in order of ranks; without gradient."""
    if axis.size == 1:
        return x
    out, work = start_all_to_all(x.contiguous(), axis=axis, send=send, receive=receive, what=what)
    work.wait()
    return out


def start_all_to_all(
    x: torch.Tensor, *, axis: Axis, send: Sequence[int], receive: Sequence[int], what: str = ""
) -> tuple[torch.Tensor, dist.Work]:
    """As all_to_all of a contiguous x on several ranks, but still running: x must live, and the result may be read,
    until and after the work has been waited for."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    work = dist.all_to_all_single(out, x, list(receive), list(send), group=axis.group, async_op=True)
    _count_sent(x, axis=axis, send=send, what=what or axis.name)
    return out, work


def _count_sent(x: torch.Tensor, *, axis: Axis, send: Sequence[int], what: str) -> None:
    row_bytes = x.shape[1:].numel() * x.element_size()
    away = sum(send) - send[axis.coordinate]
    here = axis.nodes[axis.coordinate]
    abroad = sum(rows for rows, node in zip(send, axis.nodes, strict=True) if node != here)
    axis.traffic.add(what, num_bytes=away * row_bytes, to_nodes=abroad * row_bytes)


def all_gather(x: torch.Tensor, *, axis: Axis, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """Parts of all ranks along `dim`, sizes[i] long on rank i; without gradient. Uneven parts travel padded."""
    if axis.size == 1:
        return x
    part, longest = x.movedim(dim, 0), max(sizes)
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: part.shape[0]] = part
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=axis.group)
    axis.traffic.add(axis.name, num_bytes=padded.numel() * padded.element_size() * (axis.size - 1))
    whole = torch.cat([piece[:size] for piece, size in zip(found, sizes, strict=True)])
    return whole.movedim(0, dim)


def sum_scatter(x: torch.Tensor, *, axis: Axis, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """This rank's part, sizes[rank] long along `dim`, of the sum of x over ranks; without gradient."""
    if axis.size == 1:
        return x
    mine = sizes[axis.coordinate]
    rows = all_to_all(x.movedim(dim, 0), axis=axis, send=sizes, receive=[mine] * axis.size)
    return rows.unflatten(0, (axis.size, mine)).sum(0).movedim(0, dim)


def broadcast(x: torch.Tensor, *, axis: Axis, source: int) -> torch.Tensor:
    """The x of the rank at coordinate `source`, written into the x of the others; without gradient."""
    if axis.size > 1:
        x = x.contiguous()
        dist.broadcast(x, src=axis.ranks[source], group=axis.group)
        if axis.coordinate == source:
            axis.traffic.add(axis.name, num_bytes=x.numel() * x.element_size() * (axis.size - 1))
    return x


def sum_among(x: torch.Tensor, *, axis: Axis, members: Sequence[int]) -> torch.Tensor:
    """Sum over the ranks at the coordinates `members`, of which this is one, in their order; the other ranks of the
    axis take no part. Without gradient."""
    others = [place for place in members if place != axis.coordinate]
    if not others:
        return x
    x = x.contiguous()
    found = {place: torch.empty_like(x) for place in others}
    sends = [dist.P2POp(dist.isend, x, axis.ranks[place], group=axis.group) for place in others]
    receives = [dist.P2POp(dist.irecv, found[place], axis.ranks[place], group=axis.group) for place in others]
    for work in dist.batch_isend_irecv(sends + receives):
        work.wait()
    axis.traffic.add(axis.name, num_bytes=x.numel() * x.element_size() * len(others))
    return torch.stack([found.get(place, x) for place in sorted(members)]).sum(0)


def own_part(x: torch.Tensor, *, axis: Axis, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """This rank's part of a replicated x along `dim`."""
    return x.narrow(dim, sum(sizes[: axis.coordinate]), sizes[axis.coordinate])


def even_sizes(total: int, *, axis: Axis) -> list[int]:
    """`total` cut into parts as equal as possible, the longer ones first; parts may be empty."""
    return [total // axis.size + (index < total % axis.size) for index in range(axis.size)]


def copy_to(x: torch.Tensor, *, axis: Axis) -> torch.Tensor:
    """x itself; its gradient is summed over ranks."""
    return _CopyTo.apply(x, axis) if axis.size > 1 else x


def reduce_from(x: torch.Tensor, *, axis: Axis) -> torch.Tensor:
    """Sum of x over ranks; the gradient passes unchanged."""
    return _ReduceFrom.apply(x, axis) if axis.size > 1 else x


def split(x: torch.Tensor, *, axis: Axis, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """This rank's part of a replicated x; the gradient is gathered."""
    return _Split.apply(x, axis, tuple(sizes), dim) if axis.size > 1 else x


def gather(x: torch.Tensor, *, axis: Axis, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """Parts of all ranks; what follows is replicated, so the gradient is this rank's part."""
    return _Gather.apply(x, axis, tuple(sizes), dim) if axis.size > 1 else x


def gather_for_work(x: torch.Tensor, *, axis: Axis, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """Parts of all ranks; what follows differs by rank, so the gradient is summed over ranks and scattered."""
    return _GatherForWork.apply(x, axis, tuple(sizes), dim) if axis.size > 1 else x


def reduce_scatter(x: torch.Tensor, *, axis: Axis, sizes: Sequence[int], dim: int = 0) -> torch.Tensor:
    """This rank's part of the sum over ranks; the gradient is gathered."""
    return _ReduceScatter.apply(x, axis, tuple(sizes), dim) if axis.size > 1 else x


def exchange_rows(
    rows: torch.Tensor, *, axis: Axis, send: Sequence[int], receive: Sequence[int]
) -> torch.Tensor:
    """Send rows [M, D] as all_to_all does, differentiable."""
    return _ExchangeRows.apply(rows, axis, tuple(send), tuple(receive)) if axis.size > 1 else rows


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return reduce_from(grad, axis=ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_reduce(x, axis=axis)

    @staticmethod
    def backward(ctx, grad):
        return copy_to(grad, axis=ctx.axis), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, sizes, dim):
        ctx.axis, ctx.sizes, ctx.dim = axis, sizes, dim
        return own_part(x, axis=axis, sizes=sizes, dim=dim).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return gather(grad, axis=ctx.axis, sizes=ctx.sizes, dim=ctx.dim), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, sizes, dim):
        ctx.axis, ctx.sizes, ctx.dim = axis, sizes, dim
        return all_gather(x, axis=axis, sizes=sizes, dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return split(grad, axis=ctx.axis, sizes=ctx.sizes, dim=ctx.dim), None, None, None


class _GatherForWork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, sizes, dim):
        ctx.axis, ctx.sizes, ctx.dim = axis, sizes, dim
        return all_gather(x, axis=axis, sizes=sizes, dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter(grad, axis=ctx.axis, sizes=ctx.sizes, dim=ctx.dim), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis, sizes, dim):
        ctx.axis, ctx.sizes, ctx.dim = axis, sizes, dim
        return sum_scatter(x, axis=axis, sizes=sizes, dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return gather_for_work(grad, axis=ctx.axis, sizes=ctx.sizes, dim=ctx.dim), None, None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, axis, send, receive):
        ctx.axis, ctx.send, ctx.receive = axis, send, receive
        return all_to_all(rows, axis=axis, send=send, receive=receive, what="hidden")

    @staticmethod
    def backward(ctx, grad):
        return exchange_rows(grad, axis=ctx.axis, send=ctx.receive, receive=ctx.send), None, None, None
