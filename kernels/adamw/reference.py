"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) tensor by tensor in plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class AdamWTensors:
    """What one tensor's update reads and writes: fp32 (fp64) parameter and moments, a gradient, perhaps a bf16 copy."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor
    weight_decay: float
    copy: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class AdamWStep:
    """One update: `number` counts from 1, or raises ValueError: at 0 the moments' correction divides by zero."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    number: int

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"AdamWStep: number is {self.number}; it counts updates from 1")

    @property
    def factors(self) -> tuple[float, float, float, float, float, float]:
        """What a kernel takes of it: rate, blend1, beta2, blend2, epsilon and root, such that m += (g - m) blend1,
        v = v beta2 + g^2 blend2 and p = p keep - m rate / (sqrt(v) root + epsilon). In double precision: 1 - beta2 in
        fp32 is wrong by 5e-5 of its size at 0.999, ten times that at 0.9999."""
        rate = self.learning_rate / (1 - self.beta1**self.number)
        root = 1 / math.sqrt(1 - self.beta2**self.number)
        return rate, 1 - self.beta1, self.beta2, 1 - self.beta2, self.epsilon, root

    def keep(self, weight_decay: float) -> float:
        """What decay leaves of a parameter."""
        return 1 - self.learning_rate * weight_decay


@torch.no_grad()
def adamw_reference(
    tensors: Sequence[AdamWTensors], *, step: AdamWStep, gradient_scale: torch.Tensor | None
) -> None:
    """p <- p (1 - lr wd) - lr m^ / (sqrt v^ + eps) with bias-corrected moments; gradients times gradient_scale."""
    for one in tensors:
        gradient = one.gradient.to(one.parameter.dtype)
        if gradient_scale is not None:
            gradient = gradient * gradient_scale
        one.first_moment.mul_(step.beta1).add_(gradient, alpha=1 - step.beta1)
        one.second_moment.mul_(step.beta2).addcmul_(gradient, gradient, value=1 - step.beta2)
        mean = one.first_moment / (1 - step.beta1**step.number)
        spread = (one.second_moment / (1 - step.beta2**step.number)).sqrt_().add_(step.epsilon)
        one.parameter.mul_(step.keep(one.weight_decay))
        one.parameter.addcdiv_(mean, spread, value=-step.learning_rate)
        if one.copy is not None:
            one.copy.copy_(one.parameter)
