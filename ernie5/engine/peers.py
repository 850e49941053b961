"""Who shares Muon's iterations: the ranks that hold the same parameters and, after the sum, the same gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ernie5.optim.muon import ALONE, Peers
from ernie5.parallel.collectives import all_gather
from ernie5.parallel.state import Axis, ParallelState


def find_peers(state: ParallelState) -> Peers:
    """All ranks, where each holds the whole model (dp and cp alone); else every rank works on its own."""
    axis, dims = state.dp_cp, state.dims
    if axis.size < state.world.size or dims.ep * dims.etp > 1:
        return ALONE
    return peers_along(axis)


def peers_along(axis: Axis) -> Peers:
    """The ranks of `axis`, which hold copies or pieces of the same parameters."""

    def gather(part: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        return all_gather(part, axis=axis, sizes=sizes)

    return Peers(rank=axis.coordinate, size=axis.size, gather=gather)
