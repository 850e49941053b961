"""Cross-entropy of a linear head whose logits never exist as a whole."""

from __future__ import annotations

import torch

from ..dispatch import choose_backend
from .chunked import ChunkedLinearCrossEntropy
from .reference import linear_cross_entropy_reference

OFFERED = ("torch", "reference")
CHUNK_BYTES = 8 << 20


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
    if hidden.ndim != 2 or weight.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"targets {tuple(targets.shape)}"
        )
    if choose_backend(backend, op="linear_cross_entropy", offered=OFFERED, device=hidden.device) == "reference":
        return linear_cross_entropy_reference(hidden, weight=weight, targets=targets)
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then, and this op makes it at once
        hidden, weight = hidden.detach(), weight.detach()
    rows = chunk_rows or max(64, CHUNK_BYTES // (4 * weight.shape[0]))
    return ChunkedLinearCrossEntropy.apply(hidden, weight, targets, rows)
