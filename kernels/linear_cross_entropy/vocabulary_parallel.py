"""Cross-entropy of a linear head whose rows are spread over ranks: each makes the logits of its own rows only.

Per chunk of hidden rows a rank has its logits' peak m_r, mass s_r = sum exp(logit - m_r) and, if it holds the target's
row, the target's logit. One gathering of these three numbers per hidden row gives

    log Z = logsumexp_r (m_r + log s_r),   nats = log Z - logit[target],   softmax_r = exp(logit - m_r) e^(m_r - log Z)

The gradient of the head's rows is then local; that of the hidden rows is a sum over ranks, made once per call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ..checks import first_order, require_within
from . import require_head

OP = "vocabulary_parallel_cross_entropy"


@dataclasses.dataclass(frozen=True)
class VocabularyPart:
    """Rows [first, first + rows of the weight) of a head with `vocab_size` rows that `parts` ranks share.

    gather: [3, n] of this rank -> [parts, 3, n] of all, in any order; total: sum over the ranks. Both without
    gradients, and called equally often by every rank.
    """

    first: int
    vocab_size: int
    parts: int
    gather: Callable[[torch.Tensor], torch.Tensor]
    total: Callable[[torch.Tensor], torch.Tensor]


def vocabulary_parallel_cross_entropy(
    hidden: torch.Tensor,
    *,
    weight: torch.Tensor,
    targets: torch.Tensor,
    part: VocabularyPart,
    chunk_rows: int,
) -> torch.Tensor:
    """Sum over rows of -log softmax(hidden @ whole_weight.T)[target], 0-d, at least fp32, the same on every rank.

    hidden [N, D] and targets [N] int64 (ids of the whole head) equal on all ranks; weight [v, D] this rank's rows;
    chunk_rows: hidden rows whose logits exist at one time. Raises ValueError for shapes.
    """
    require_head(hidden, weight=weight, targets=targets, op=OP)
    require_within(targets, limit=part.vocab_size, op=OP, name="targets")
    if not torch.is_grad_enabled():  # gradients are made in the forward pass, and only if somebody wants them
        hidden, weight = hidden.detach(), weight.detach()
    return _VocabularyParallel.apply(hidden, weight, targets, part, chunk_rows)


class _VocabularyParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        part: VocabularyPart,
        chunk_rows: int,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = hidden[start : start + chunk_rows]
            local = targets[start : start + chunk_rows] - part.first
            is_here = (local >= 0) & (local < weight.shape[0])
            local = local.clamp(0, weight.shape[0] - 1).unsqueeze(1)
            logits = (rows @ weight.T).to(wide)
            picked = logits.gather(1, local).squeeze(1) * is_here
            peak = logits.amax(1)
            exp = logits.sub_(peak.unsqueeze(1)).exp_()
            peaks, masses, targeted = part.gather(torch.stack((peak, exp.sum(1), picked))).unbind(1)
            normalizer = torch.logsumexp(peaks + masses.log(), dim=0)
            total += (normalizer - targeted.sum(0)).sum()
            if not (need_hidden or need_weight):
                continue
            delta = exp.mul_((peak - normalizer).exp_().unsqueeze(1))
            delta = delta.scatter_add_(1, local, -is_here.to(wide).unsqueeze(1)).to(hidden.dtype)
            if need_hidden:
                torch.mm(delta, weight, out=grad_hidden[start : start + chunk_rows])
            if need_weight:
                grad_weight += delta.T @ rows
        if need_hidden:
            grad_hidden = part.total(grad_hidden)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (  # grad is one fp32 number: rounded to bf16 it would scale every gradient up to 2^-9 wrong
            None if grad_hidden is None else grad_hidden * grad,
            None if grad_weight is None else grad_weight * grad,
            None,
            None,
            None,
        )
