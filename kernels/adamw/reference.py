"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) tensor by tensor in plain PyTorch."""

from __future__ import annotations

import dataclasses
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
        one.parameter.mul_(1 - step.learning_rate * one.weight_decay)
        one.parameter.addcdiv_(mean, spread, value=-step.learning_rate)
        if one.copy is not None:
            one.copy.copy_(one.parameter)
