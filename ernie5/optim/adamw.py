"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) over parameter groups, with state that exists from the start."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_adamw(groups: Sequence[ParameterGroup], *, config: OptimConfig) -> torch.optim.AdamW:
    """torch's fused AdamW on `groups` (fp32 parameters, or masters): one kernel for all tensors of a device."""
    return torch.optim.AdamW(
        [{"params": list(g.parameters), "weight_decay": g.weight_decay, "name": g.name} for g in groups],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def materialise_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the zero moments and counters that the first `step` would create, so that state can be loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            create_state(optimizer, parameter=parameter)


def create_state(optimizer: torch.optim.Optimizer, *, parameter: torch.Tensor) -> None:
    """Create AdamW's zero state of one parameter where none exists."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter)
