"""The gradient norm of a model that is spread over ranks: every parameter counts exactly once."""

from __future__ import annotations

import torch

from ernie5.optim.clip import global_norm, scale_gradients
from ernie5.parallel.apply import Layout
from ernie5.parallel.collectives import all_reduce


def clip_over_ranks(gradients: dict[str, torch.Tensor], *, layout: Layout, max_norm: float) -> torch.Tensor:
    """Clip this rank's parts in place by the norm over all ranks, and return the norm before, 0-d fp32; collective.

    Of the ranks that hold the same part of a parameter the first counts it (`Layout.is_counted_here`).
    """
    counted = [gradient for name, gradient in gradients.items() if layout.is_counted_here(name)]
    everything = list(gradients.values())
    norm = global_norm(
        counted or [torch.zeros_like(everything[0])],
        reduce=lambda squares: all_reduce(squares, axis=layout.state.world),
    )
    scale_gradients(everything, norm=norm, max_norm=max_norm)
    return norm
