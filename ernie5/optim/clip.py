"""Gradient clipping by the global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ernie5_kernels.sum_squares import sum_squares

Reduce = Callable[[torch.Tensor], torch.Tensor]
EPSILON = 1e-6


def global_norm(gradients: Iterable[torch.Tensor], *, reduce: Reduce | None = None) -> torch.Tensor:
    """Euclidean norm over all gradients, 0-d fp32 (fp64 of fp64 gradients).

    reduce: maps this rank's sum of squares to the sum over the ranks that hold different parameters (the caller
    counts replicated parameters once); None where one process holds everything.
    """
    squares = sum_squares(list(gradients))
    return (squares if reduce is None else reduce(squares)).sqrt()


def scale_gradients(gradients: list[torch.Tensor], *, norm: torch.Tensor, max_norm: float) -> None:
    """Scale `gradients` in place by `clip_factor`; `norm` may be that of more than these."""
    factor = clip_factor(norm, max_norm=max_norm)
    if factor is not None:
        torch._foreach_mul_(gradients, factor)


def clip_factor(norm: torch.Tensor, *, max_norm: float) -> torch.Tensor | None:
    """min(1, max_norm / (norm + 1e-6)), 0-d; None for max_norm 0, which clips nothing.

    The 1e-6 is torch's and DeepSpeed's, so that all engines clip alike.
    """
    return (max_norm / (norm + EPSILON)).clamp(max=1.0) if max_norm > 0 else None
