"""Muon: momentum whose update is orthogonalised by Newton-Schulz iterations, for hidden matrices.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); scale after
arXiv:2502.16982, equation 4: 0.2 * sqrt(max(rows, columns)), which gives updates the root mean square of AdamW's, so
that learning rate and weight decay carry over. Everything that is not a hidden matrix is stepped by AdamW.

The iterations are most of its cost and the same on every rank that holds the same gradients, so such peers share them:
each does an even part of the matrices and gathers the others' results, in the type the iterations run in (no rounding).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ernie5.optim.adamw import AdamW, materialise_state
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup

COEFFICIENTS = (3.4445, -4.7750, 2.0315)

JOINED_NUMBERS = 2**24
"""Elements that stacks of small matrices are joined up to: 64 MiB of fp32 beside the momenta."""


@dataclasses.dataclass(frozen=True)
class Peers:
    """Ranks that hold equal gradients and parameters. gather: flat parts and their sizes in order of ranks -> whole."""

    rank: int
    size: int
    gather: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


ALONE = Peers(rank=0, size=1, gather=lambda part, sizes: part)


def orthogonalise(matrix: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Nearest semi-orthogonal matrix to `matrix` [.., M, N], roughly: singular values land in about [0.7, 1.2].

    Quintic Newton-Schulz iteration X <- aX + (bA + cA^2) X with A = X X^T, in bf16 where the processor multiplies it
    natively (two and a half times as fast on AVX-512), else in fp32: the type of the result.
    """
    a, b, c = COEFFICIENTS
    work = matrix.flatten(0, -3) if matrix.dim() > 2 else matrix[None]
    tall = work.shape[-2] > work.shape[-1]
    work = work.mT if tall else work
    norm = torch.linalg.matrix_norm(work.float(), keepdim=True) + 1e-7
    work = (work.float() / norm).to(_work_dtype(matrix.device))
    for _ in range(steps):
        gram = work @ work.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        work = torch.baddbmm(work, inner, work, beta=a)
    return (work.mT if tall else work).reshape(matrix.shape)


def orthogonalise_all(stacks: Sequence[torch.Tensor], *, steps: int) -> list[torch.Tensor]:
    """`orthogonalise` of every stack [n, M, N]. On a GPU, where launches of small products cost more than the products,
    stacks of one shape are iterated together, as many as `JOINED_NUMBERS` allows."""
    if not stacks or stacks[0].device.type == "cpu":
        return [orthogonalise(stack, steps=steps) for stack in stacks]
    results: list[torch.Tensor | None] = [None] * len(stacks)
    for batch in join_stacks(stacks, limit=JOINED_NUMBERS):
        joined = orthogonalise(torch.cat([stacks[index] for index in batch]), steps=steps)
        for index, part in zip(batch, joined.split([len(stacks[index]) for index in batch]), strict=True):
            results[index] = part
    return results


def join_stacks(stacks: Sequence[torch.Tensor], *, limit: int) -> list[list[int]]:
    """Indices of stacks [n, M, N] that go together: equal matrices, at most `limit` elements unless one has more."""
    by_shape: dict[torch.Size, list[list[int]]] = {}
    for index, stack in enumerate(stacks):
        batches = by_shape.setdefault(stack.shape[-2:], [[]])
        if batches[-1] and sum(stacks[k].numel() for k in batches[-1]) + stack.numel() > limit:
            batches.append([])
        batches[-1].append(index)
    return [batch for batches in by_shape.values() for batch in batches]


def _work_dtype(device: torch.device) -> torch.dtype:
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    is_native = device.type != "cpu" or features.get("avx512_bf16") or features.get("amx_bf16")
    return torch.bfloat16 if is_native else torch.float32


class Muon(torch.optim.Optimizer):
    """Muon for groups of hidden matrices, AdamW inside for all others; one `step`, one `param_groups` list."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        config: OptimConfig,
        peers: Peers = ALONE,
        copies: Mapping[torch.nn.Parameter, torch.nn.Parameter] | None = None,
    ) -> None:
        super().__init__(
            [
                {
                    "params": list(g.parameters), "weight_decay": g.weight_decay, "name": g.name,
                    "is_matrix": g.is_matrix, "fused": g.fused,
                }
                for g in groups
            ],
            {"lr": config.learning_rate},
        )
        self._config = config
        self._peers, self._copies = peers, dict(copies or {})
        others = [group for group in groups if not group.is_matrix]
        self._adamw = AdamW(others, config=config, copies=copies) if others else None
        if self._adamw is not None:
            self._adamw.state = self.state

        self.materialise()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Torch's own, which puts a new state in the place of the one that the inner AdamW shares."""
        super().load_state_dict(state_dict)
        if self._adamw is not None:
            self._adamw.state = self.state

    def materialise(self) -> None:
        """Create all state at once: momentum for matrices, AdamW's moments and counters for the others."""
        for group in self.param_groups:
            if group["is_matrix"]:
                for parameter in group["params"]:
                    self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        if self._adamw is not None:
            materialise_state(self._adamw)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, gradient_scale: torch.Tensor | None = None
    ) -> None:
        """Update every parameter that has a gradient, times `gradient_scale` (one number, such as a clip factor)."""
        if closure is not None:
            raise TypeError("Muon takes no closure")
        self._step_matrices(gradient_scale)
        if self._adamw is not None:
            rates = [group["lr"] for group in self.param_groups if not group["is_matrix"]]
            for group, rate in zip(self._adamw.param_groups, rates, strict=True):
                group["lr"] = rate
            self._adamw.step(gradient_scale=gradient_scale)

    def _step_matrices(self, gradient_scale: torch.Tensor | None) -> None:
        stacks = [
            (parameter, fused, group)
            for group in self.param_groups
            if group["is_matrix"]
            for parameter, fused in zip(group["params"], group["fused"], strict=True)
        ]
        gradients = [parameter.grad for parameter, _, _ in stacks if parameter.grad is not None]
        if gradient_scale is not None and gradients:
            torch._foreach_mul_(gradients, gradient_scale)
        shapes = [shape_of_maps(parameter, fused=fused) for parameter, fused, _ in stacks]
        directions = self._directions([parameter for parameter, _, _ in stacks], shapes=shapes)
        for (parameter, _, group), shape, direction in zip(stacks, shapes, directions, strict=True):
            if parameter.grad is not None:
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                step = group["lr"] * 0.2 * math.sqrt(max(shape[-2:]))
                parameter.add_(direction.reshape(parameter.shape), alpha=-step)
                if parameter in self._copies:
                    self._copies[parameter].copy_(parameter)

    def _directions(
        self, parameters: Sequence[torch.nn.Parameter], *, shapes: Sequence[torch.Size]
    ) -> tuple[torch.Tensor, ...]:
        """Orthogonalised momentum of every parameter, flat: this rank's share of the matrices and its peers'."""
        cuts = share_matrices(shapes, num_ranks=self._peers.size)
        rank = self._peers.rank
        momenta = [
            self._momentum(parameter).reshape(-1, *shape[-2:])[cut[rank] : cut[rank + 1]]
            for parameter, shape, cut in zip(parameters, shapes, cuts, strict=True)
        ]
        own = [direction.flatten() for direction in orthogonalise_all(momenta, steps=self._config.muon_steps)]
        sizes = [
            sum((cut[rank + 1] - cut[rank]) * shape[-2:].numel() for cut, shape in zip(cuts, shapes, strict=True))
            for rank in range(self._peers.size)
        ]
        return self._peers.gather(torch.cat(own), sizes).split([shape.numel() for shape in shapes])

    def _momentum(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Moves the momentum; Nesterov's look ahead from it. Zeros for a parameter without a gradient."""
        if parameter.grad is None:
            return torch.zeros_like(parameter)
        momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1.0 - self._config.muon_momentum)
        return parameter.grad.lerp(momentum, self._config.muon_momentum)


def shape_of_maps(parameter: torch.nn.Parameter, *, fused: int) -> torch.Size:
    """[.., M, N] of the maps in a parameter.

    Gate and up are two, [.., 2F, D] -> [.., 2, F, D]; a kernel [out, in, h, w] is one, from all that it sees to its
    output: [1, out, in*h*w].
    """
    if parameter.dim() == 4:
        return torch.Size((1, parameter.shape[0], parameter.shape[1:].numel()))
    return parameter.unflatten(-2, (fused, -1)).shape


def share_matrices(shapes: Sequence[torch.Size], *, num_ranks: int) -> list[list[int]]:
    """Which matrices of stacks `shapes` [.., M, N] each rank iterates: rank r those from cuts[stack][r] to [r + 1].

    Parts cost about as much, and follow each other: part after part in order of ranks is stack after stack.
    """
    costs = [shape[-2:].numel() * min(shape[-2:]) for shape in shapes]
    counts = [shape[:-2].numel() for shape in shapes]
    total = sum(cost * count for cost, count in zip(costs, counts, strict=True))
    cuts, before = [], 0
    for cost, count in zip(costs, counts, strict=True):
        bounds = [-(-(total * rank - before * num_ranks) // (cost * num_ranks)) for rank in range(num_ranks + 1)]
        cuts.append([min(max(bound, 0), count) for bound in bounds])
        before += cost * count
    return cuts
