"""Muon where every rank of an axis keeps a piece of the flattened parameters, as ZeRO's first two stages do.

A momentum moves element by element, a matrix is orthogonalised as a whole. So the ranks move their pieces of the
momentum, gather them bucket by bucket, orthogonalise an even part of the matrices each, gather the results, and step
their pieces of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from ernie5.optim.adamw import AdamW, create_state
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import Peers, orthogonalise, share_matrices

BUCKET_ELEMENTS = 50_000_000


class FlatMuon(AdamW):
    """Muon for groups of hidden matrices, AdamW for all others; made of whole parameters, stepped on their pieces.

    After it was made, each group's parameters are to be replaced by one flat piece: equal parts of the parameters one
    after another, padded at the end. peers: the ranks that hold the pieces of a group, by its name.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], *, config: OptimConfig, peers: Mapping[str, Peers]
    ) -> None:
        super().__init__(groups, config=config)
        self._config, self._peers = config, dict(peers)
        # gate and up are two maps: [.., 2F, D] -> [.., 2, F, D]
        self._shapes = {
            group.name: [p.unflatten(-2, (n, -1)).shape for p, n in zip(group.parameters, group.fused, strict=True)]
            for group in groups
            if group.is_matrix
        }

    def materialise(self) -> None:
        """Create the state of the pieces: a momentum for matrices, AdamW's for the others."""
        for group in self.param_groups:
            for piece in group["params"]:
                if group["name"] not in self._shapes:
                    create_state(self, parameter=piece)
                elif not self.state[piece]:
                    self.state[piece]["momentum"] = torch.zeros_like(piece)

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: torch.Tensor | None = None) -> None:
        """Update the pieces of all groups, times `gradient_scale`; collective over the peers of each."""
        self.materialise()
        everything = self.param_groups
        for group in everything:
            if group["name"] in self._shapes:
                self._step_matrices(group, gradient_scale=gradient_scale)
        self.param_groups = [group for group in everything if group["name"] not in self._shapes]
        try:
            super().step(closure, gradient_scale=gradient_scale)
        finally:
            self.param_groups = everything

    def _step_matrices(self, group: dict, *, gradient_scale: torch.Tensor | None) -> None:
        (piece,) = group["params"]
        gradient = piece.grad if gradient_scale is None else piece.grad * gradient_scale
        momentum = self.state[piece]["momentum"].lerp_(gradient, 1.0 - self._config.muon_momentum)
        ahead = gradient.lerp(momentum, self._config.muon_momentum)
        piece.mul_(1.0 - group["lr"] * group["weight_decay"])
        peers, first = self._peers[group["name"]], 0
        for shapes in _buckets(self._shapes[group["name"]]):
            # where the ranks' pieces cut the elements of this bucket
            stop = first + sum(shape.numel() for shape in shapes)
            cuts = [min(max(rank * piece.numel(), first), stop) for rank in range(peers.size)] + [stop]
            sizes = [end - start for start, end in zip(cuts, cuts[1:], strict=False)]
            start = cuts[peers.rank] - peers.rank * piece.numel()
            own = slice(start, start + sizes[peers.rank])
            whole = peers.gather(ahead[own], sizes)
            update = self._direction(whole, shapes=shapes, peers=peers)[cuts[peers.rank] - first :][: own.stop - start]
            piece[own].add_(update, alpha=-group["lr"])
            first = stop

    def _direction(self, whole: torch.Tensor, *, shapes: Sequence[torch.Size], peers: Peers) -> torch.Tensor:
        """Orthogonalised matrices out of the flat momentum of a bucket, flat fp32, in the scale of AdamW's updates."""
        shares = share_matrices(shapes, num_ranks=peers.size)
        own = []
        for part, shape, cut in zip(whole.split([shape.numel() for shape in shapes]), shapes, shares, strict=True):
            matrices = part.view(-1, *shape[-2:])[cut[peers.rank] : cut[peers.rank + 1]]
            own.append(orthogonalise(matrices, steps=self._config.muon_steps).flatten())
        sizes = [
            sum((cut[rank + 1] - cut[rank]) * shape[-2:].numel() for cut, shape in zip(shares, shapes, strict=True))
            for rank in range(peers.size)
        ]
        found = peers.gather(torch.cat(own), sizes).split([shape.numel() for shape in shapes])
        scaled = zip(found, shapes, strict=True)
        return torch.cat([part.float() * (0.2 * math.sqrt(max(shape[-2:]))) for part, shape in scaled])


def _buckets(shapes: Sequence[torch.Size]) -> Iterator[list[torch.Size]]:
    """Neighbouring shapes of at most BUCKET_ELEMENTS together, or one of more."""
    bucket: list[torch.Size] = []
    for shape in shapes:
        if bucket and sum(one.numel() for one in bucket) + shape.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket = []
        bucket.append(shape)
    if bucket:
        yield bucket
