"""SwiGLU with a hand-written backward that keeps its input alone and recomputes the rest."""

from __future__ import annotations

import torch

from ..checks import first_order


class FusedSwiGLU(torch.autograd.Function):
    """y = silu(g) u p per row. The row weight p goes in here because F is narrower than D (PARALLEL section 4).

    dL/dp = sum_F dy silu(g) u needs no copy of the experts' unweighted output.
    """

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor, row_weights: torch.Tensor | None) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.nn.functional.silu(gate).mul_(up)
        ctx.weighted = row_weights is not None
        ctx.save_for_backward(gate_up, *(() if row_weights is None else (row_weights,)))
        return out if row_weights is None else out.mul_(row_weights.to(out.dtype).unsqueeze(-1))

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, *weighing = ctx.saved_tensors  # once: activations that are computed again come once
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        grad_weights = None
        if ctx.weighted:
            (weights,) = weighing
            sums_dtype = torch.promote_types(grad.dtype, torch.float32)
            grad_weights = (grad * activated).mul_(up).sum(-1, dtype=sums_dtype).to(weights.dtype)
            grad = grad * weights.to(grad.dtype).unsqueeze(-1)
        if torch.compiler.is_compiling():  # which writes into no part of a tensor
            return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), grad * activated), -1), grad_weights
        grad_input = torch.empty_like(gate_up)
        width = gate.shape[-1]
        torch.mul(grad, activated, out=grad_input[..., width:])
        grad_input[..., :width] = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_input, grad_weights
