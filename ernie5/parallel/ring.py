"""Ring attention: keys and values travel around the context ranks while queries stay (Liu et al., arXiv:2310.01889).

At step s, rank r meets the keys of rank r-s. Partial results with log-sum-exp l1, l2 merge as

    l = log(e^l1 + e^l2),  o = e^(l1-l) o1 + e^(l2-l) o2

The backward pass runs the ring again with the whole row's l and delta = rowsum(dO * O); the gradients of a rank's keys
and values travel with them and arrive at home after R steps. What each query may see is decided once per batch.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.distributed as dist

from ernie5.parallel.state import Axis
from ernie5.parallel.token_split import Splitter
from ernie5_kernels.attention import AttentionPlan, attend, attend_backward, plan_piecewise
from ernie5_kernels.checks import first_order

KEPT_MASK_BYTES = 64 << 20
KEYS_TAG, GRADIENTS_TAG = 1, 2
WAY_OUT = 'Set parallel.context: ulysses, with backend="reference", or parallel.cp: 1'


@dataclasses.dataclass(frozen=True)
class RingPlan:
    """steps[s]: attention of this rank's queries over the keys of the rank s places before it."""

    steps: tuple[AttentionPlan, ...]


class RingPlanner:
    """Makes the plan of a batch that `cut_batch` has cut."""

    def __init__(self, axis: Axis, *, splitter: Splitter) -> None:
        self._rank, self._splitter = axis.coordinate, splitter

    def __call__(
        self, intervals: torch.Tensor, *, batch_rows: int, query_tokens: int, key_tokens: int
    ) -> RingPlan:
        """intervals [B, all_tokens, 4] of every rank's columns; query_tokens: positions of this rank."""
        split = self._splitter.of_part(query_tokens)
        keep = batch_rows * query_tokens * intervals.shape[1] <= KEPT_MASK_BYTES
        sources = [(self._rank - step) % split.ranks for step in range(split.ranks)]
        columns = [intervals.index_select(1, split.order(source).to(intervals.device)) for source in sources]
        pieces = split.pieces(self._rank)
        return RingPlan(tuple(plan_piecewise(c, pieces=pieces, keep_masks=keep) for c in columns))


class RingAttention:
    """The AttentionOp of a rank that holds a part of each row."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def __call__(
        self, query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, plan: RingPlan
    ) -> torch.Tensor:
        """query [B, t, H, C], key and value [B, t, G, C] of this rank's t positions -> [B, t, H, C]; collective."""
        return _Ring.apply(query, key, value, plan, self._axis)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: RingPlan,
        axis: Axis,
    ) -> torch.Tensor:
        wide, scale = torch.promote_types(query.dtype, torch.float32), query.shape[-1] ** -0.5
        out = torch.zeros(query.shape, dtype=wide, device=query.device)
        lse = torch.full(query.shape[:3], float("-inf"), dtype=wide, device=query.device)
        travelling = torch.stack((key, value))
        for step, part in enumerate(plan.steps):
            is_last = step + 1 == len(plan.steps)
            arriving = None if is_last else _Shift(travelling, axis=axis, tag=KEYS_TAG)
            keys, values = travelling.unbind()
            merge(out, lse, *attend(query, key=keys, value=values, plan=part, scale=scale, dtype=wide))
            travelling = travelling if arriving is None else arriving.wait()
        result = out.to(query.dtype)
        ctx.plan, ctx.axis, ctx.scale = plan, axis, scale
        ctx.save_for_backward(query, key, value, result, lse.masked_fill_(lse == float("-inf"), float("inf")))
        return result

    @staticmethod
    @functools.partial(first_order, way_out=WAY_OUT)
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        grad_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
        travelling, gathered = torch.stack((key, value)), None
        for step, part in enumerate(ctx.plan.steps):
            is_last = step + 1 == len(ctx.plan.steps)
            arriving = None if is_last else _Shift(travelling, axis=ctx.axis, tag=KEYS_TAG)
            keys, values = travelling.unbind()
            by_query, by_key, by_value = attend_backward(
                grad, query=query, key=keys, value=values, lse=lse, delta=delta, plan=part, scale=ctx.scale
            )
            grad_query += by_query
            own = torch.stack((by_key, by_value))
            own = own if gathered is None else own.add_(gathered.wait())
            gathered = _Shift(own, axis=ctx.axis, tag=GRADIENTS_TAG)
            travelling = travelling if arriving is None else arriving.wait()
        grad_key, grad_value = gathered.wait().unbind()
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge a partial attention into `out` [B, T, H, C] and `lse` [B, T, H] in place.

    lse is -inf where nothing has been seen yet; part_lse is +inf where a row sees nothing of its keys.
    """
    part_lse = part_lse.masked_fill(part_lse == float("inf"), float("-inf"))
    total = torch.logaddexp(lse, part_lse)
    finite = total.clamp(min=torch.finfo(total.dtype).min)
    out.mul_((lse - finite).exp_().unsqueeze(-1)).add_(part * (part_lse - finite).exp_().unsqueeze(-1))
    lse.copy_(total)


class _Shift:
    """One tensor to the next rank of the ring and one from the rank before, under way until `wait`."""

    def __init__(self, tensor: torch.Tensor, *, axis: Axis, tag: int) -> None:
        self._sent, self._arrived, self._requests = tensor, tensor, []
        if axis.size > 1:
            after, before = (axis.ranks[(axis.coordinate + step) % axis.size] for step in (1, -1))
            self._arrived = torch.empty_like(tensor)
            self._requests = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, self._sent, after, axis.group, tag),
                    dist.P2POp(dist.irecv, self._arrived, before, axis.group, tag),
                ]
            )
            axis.traffic.add("ring", num_bytes=tensor.numel() * tensor.element_size())

    def wait(self) -> torch.Tensor:
        """What arrived."""
        for request in self._requests:
            request.wait()
        return self._arrived
