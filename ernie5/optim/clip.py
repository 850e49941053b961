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


def clip_gradients(
    gradients: Iterable[torch.Tensor], *, max_norm: float, reduce: Reduce | None = None
) -> torch.Tensor:
    """Scale `gradients` in place by min(1, max_norm / (norm + 1e-6)) and return the norm before, 0-d fp32.

    max_norm 0 only measures. The 1e-6 is torch's and DeepSpeed's, so that all engines clip alike.
    """
    gradients = list(gradients)
    norm = global_norm(gradients, reduce=reduce)
    scale_gradients(gradients, norm=norm, max_norm=max_norm)
    return norm


def scale_gradients(gradients: list[torch.Tensor], *, norm: torch.Tensor, max_norm: float) -> None:
    """The second half of `clip_gradients`, for a norm over more than these gradients."""
    factor = clip_factor(norm, max_norm=max_norm)
    if factor is not None:
        torch._foreach_mul_(gradients, factor)


def clip_factor(norm: torch.Tensor, *, max_norm: float) -> torch.Tensor | None:
    """min(1, max_norm / (norm + 1e-6)), 0-d; None for max_norm 0, which clips nothing."""
    return (max_norm / (norm + EPSILON)).clamp(max=1.0) if max_norm > 0 else None
