"""The gradient norm of a model that is spread over ranks: every parameter counts exactly once."""

from __future__ import annotations

import torch

from ernie5.optim.clip import global_norm, scale_gradients
from ernie5.parallel.apply import Layout
from ernie5.parallel.collectives import all_reduce


def norm_over_ranks(gradients: dict[str, torch.Tensor], *, layout: Layout) -> torch.Tensor:
    """The norm over all ranks, 0-d; collective. Of the ranks that hold the same part of a parameter the first counts it
    (`Layout.is_counted_here`)."""
    counted = [gradient for name, gradient in gradients.items() if layout.is_counted_here(name)]
    return global_norm(
        counted or [torch.zeros_like(next(iter(gradients.values())))],
        reduce=lambda squares: all_reduce(squares, axis=layout.state.world),
    )


def clip_over_ranks(gradients: dict[str, torch.Tensor], *, layout: Layout, max_norm: float) -> torch.Tensor:
    """Clip this rank's parts in place by the norm over all ranks, and return the norm before; collective."""
    norm = norm_over_ranks(gradients, layout=layout)
    scale_gradients(list(gradients.values()), norm=norm, max_norm=max_norm)
    return norm
