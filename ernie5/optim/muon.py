"""Muon: momentum whose update is orthogonalised by Newton-Schulz iterations, for hidden matrices.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); scale after
arXiv:2502.16982, equation 4: 0.2 * sqrt(max(rows, columns)) of the whole matrix, which gives updates the root mean
square of AdamW's, so that learning rate and weight decay carry over. Everything that is not a hidden matrix is stepped
by AdamW.

A momentum moves element by element, on each rank that of its part; what needs whole matrices is in `spread`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ernie5.optim.adamw import AdamW, materialise_state
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.spread import Spread, buckets, find_directions


class Muon(torch.optim.Optimizer):
    """Muon for groups of hidden matrices, AdamW inside for all others; one `step`, one `param_groups` list.

    spreads: by name, of the matrices that ranks share; others are held whole by one rank.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        config: OptimConfig,
        spreads: Mapping[str, Spread] | None = None,
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
        self._config, self._copies = config, dict(copies or {})
        self._spreads = {
            parameter: (spreads or {}).get(name, Spread(parameter.shape))
            for group in groups
            if group.is_matrix
            for name, parameter in zip(group.names, group.parameters, strict=True)
        }
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
        for bucket in buckets([self._spreads[parameter] for parameter, _, _ in stacks]):
            self._step_bucket([stacks[index] for index in bucket])

    def _step_bucket(self, stacks: Sequence[tuple[torch.nn.Parameter, int, dict]]) -> None:
        spreads = [self._spreads[parameter] for parameter, _, _ in stacks]
        maps = [spread.maps(fused) for spread, (_, fused, _) in zip(spreads, stacks, strict=True)]
        momenta = [self._move_momentum(parameter).flatten() for parameter, _, _ in stacks]
        directions = find_directions(momenta, spreads=spreads, maps=maps, steps=self._config.muon_steps)
        for (parameter, _, group), shape, direction in zip(stacks, maps, directions, strict=True):
            if parameter.grad is not None:
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(direction.reshape(parameter.shape), alpha=-group["lr"] * scale_of(shape))
                if parameter in self._copies:
                    self._copies[parameter].copy_(parameter)

    def _move_momentum(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Moves the momentum; Nesterov's look ahead from it. Zeros for a parameter without a gradient."""
        if parameter.grad is None:
            return torch.zeros_like(parameter)
        momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1.0 - self._config.muon_momentum)
        return parameter.grad.lerp(momentum, self._config.muon_momentum)


def scale_of(maps: torch.Size) -> float:
    """What an orthogonalised matrix [.., M, N] is multiplied by to have the root mean square of AdamW's updates."""
    return 0.2 * math.sqrt(max(maps[-2:]))
