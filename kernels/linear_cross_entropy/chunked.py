"""Cross-entropy of a linear head in chunks of rows; gradients are made in the forward pass, so logits live briefly.

The sum has one scalar upstream gradient g, hence dL/dhidden = g (softmax - onehot) W can be stored up to g: three
matrix products per chunk instead of four with recomputation, and [chunk, V] memory (as Liger-Kernel does).
"""

from __future__ import annotations

import torch

from ..checks import first_order


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Sum of nats over rows; see the module's docstring."""

    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_rows: int
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows, ids = hidden[start : start + chunk_rows], targets[start : start + chunk_rows].unsqueeze(-1)
            logits = (rows @ weight.T).to(wide)
            picked = logits.gather(1, ids)
            peak = logits.amax(1, keepdim=True)
            exp = logits.sub_(peak).exp_()
            mass = exp.sum(1, keepdim=True)
            total += (mass.log() + peak - picked).sum()
            if not (need_hidden or need_weight):
                continue
            delta = exp.div_(mass).scatter_add_(1, ids, exp.new_full(ids.shape, -1.0)).to(hidden.dtype)
            if need_hidden:
                torch.mm(delta, weight, out=grad_hidden[start : start + chunk_rows])
            if need_weight:
                _accumulate(grad_weight, delta=delta, rows=rows)
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
        )


def _accumulate(total: torch.Tensor, *, delta: torch.Tensor, rows: torch.Tensor) -> None:
    if total.dtype == delta.dtype:
        total.addmm_(delta.T, rows)
    else:
        total += delta.T @ rows
