"""Cross-entropy of a linear head whose logits never exist as a whole."""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_float, require_fractions, require_shape, require_within
from ..dispatch import choose_backend
from ..native.library import runs_native
from .chunked import ChunkedLinearCrossEntropy
from .native import NativeLinearCrossEntropy
from .reference import linear_cross_entropy_reference, partials_reference

OFFERED = ("triton", "native", "torch", "reference")
CHUNK_BYTES = 8 << 20
OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: torch.Tensor,
    *,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the sum over rows of -log softmax(hidden @ weight.T)[target], 0-d, at least fp32, 0 for no rows.

    hidden [N, D]; weight [V, D] of the same dtype; targets [N] int64 in 0..V-1. chunk_rows: rows whose logits exist
    at one time, by default as many as fit 8 MiB (a cache's worth on CPU). Raises KernelError for a backend that
    cannot run, ValueError for shapes.
    """
    require_head(hidden, weight=weight, targets=targets, op=OP)
    require_within(targets, limit=weight.shape[0], op=OP, name="targets")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{OP}: chunk_rows is {chunk_rows}; it must be at least 1")
    native = runs_native(hidden, weight)
    chosen = choose_backend(
        backend, op=OP, offered=OFFERED, device=hidden.device, dtype=hidden.dtype, native=native
    )
    if chosen == "reference":
        return linear_cross_entropy_reference(hidden, weight=weight, targets=targets)
    if chosen == "triton":
        from .kernel import linear_cross_entropy_triton

        _require_triton(hidden, weight=weight)
        return linear_cross_entropy_triton(hidden, weight=weight, targets=targets)
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then, and this op makes it at once
        hidden, weight = hidden.detach(), weight.detach()
    if chosen == "native":
        return NativeLinearCrossEntropy.apply(hidden, weight, targets)
    rows = chunk_rows or max(64, CHUNK_BYTES // (4 * weight.shape[0]))
    return ChunkedLinearCrossEntropy.apply(hidden, weight, targets, rows)


def vocabulary_partials(
    hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor, first_id: int, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a holder of ids first_id .. first_id + V - 1 (weight [V, D]) contributes to the loss of hidden [N, D].

    Returns (largest logit, sum of exp(logit - largest), the target's logit or 0), each [N] fp32; no gradient. Over all
    holders: peak = max, mass = sum of mass_i exp(peak_i - peak), loss = log(mass) + peak - sum of the target's logits.
    Raises KernelError and ValueError as `linear_cross_entropy`; targets are any ids of the whole vocabulary.
    """
    require_head(hidden, weight=weight, targets=targets, op=OP)
    chosen = choose_backend(
        backend, op=OP, offered=("triton", "reference"), device=hidden.device, dtype=hidden.dtype
    )
    if chosen == "triton":
        from .kernel import partials_triton

        _require_triton(hidden, weight=weight)
        return partials_triton(hidden.detach(), weight.detach(), targets, first_id)
    return partials_reference(hidden.detach(), weight=weight.detach(), targets=targets, first_id=first_id)


def require_head(hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor, op: str) -> None:
    """Ask that hidden [N, D], weight [V, D] and targets [N] int64 fit each other, as every head's loss does."""
    require(hidden.ndim == 2, op=op, name="hidden", tensor=hidden, rule="it must be [rows, width]")
    require_fractions(hidden, op=op, name="hidden")
    holds = weight.ndim == 2 and weight.shape[0] > 0 and weight.shape[1] == hidden.shape[1]
    rule = "it must be [ids, width] with at least one id and the width of hidden"
    require(holds, op=op, name="weight", tensor=weight, rule=rule)
    require_beside(weight, first=hidden, op=op, name="weight", same_dtype=True)
    require_shape(targets, shape=hidden.shape[:1], op=op, name="targets", meaning="one per row of hidden")
    require(targets.dtype == torch.int64, op=op, name="targets", tensor=targets, rule="it must be int64")
    require_beside(targets, first=hidden, op=op, name="targets")


def _require_triton(hidden: torch.Tensor, *, weight: torch.Tensor) -> None:
    require_float(hidden, op=OP, name="hidden")
    rule = "it must be contiguous, because the head is too large to copy"
    require(weight.is_contiguous(), op=OP, name="weight", tensor=weight, rule=rule)
