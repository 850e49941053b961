"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) by our own kernel, for every engine: gradients in fp32 or in the
bf16 weights' dtype, clipping and bf16 weights in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5_kernels.adamw import AdamWStep, AdamWTensors, adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class KernelAdamW(torch.optim.Optimizer):
    """What AdamW and CompactAdamW are made of; abstract. copies: the bf16 weight under an fp32 master."""

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        config: OptimConfig,
        copies: Mapping[torch.nn.Parameter, torch.nn.Parameter] | None = None,
    ) -> None:
        super().__init__(
            [{"params": list(g.parameters), "weight_decay": g.weight_decay, "name": g.name} for g in groups],
            {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon},
        )
        self._copies = dict(copies or {})
        self._begin(config)

    def _begin(self, config: OptimConfig) -> None:
        """What there is to do once the groups are known."""


class AdamW(KernelAdamW):
    """AdamW over fp32 (fp64) parameters, or masters; state is named as torch's.

    State is made by `materialise_state` or by the first step and not here, because DeepSpeed puts flat pieces in the
    place of parameters. copies: the bf16 weight under a master, written in the same pass. A gradient may be bf16 where
    the master's `grad_dtype` allows it.
    """

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: torch.Tensor | None = None) -> None:
        """Update every parameter that has a gradient, times `gradient_scale` (one number, such as a clip factor)."""
        if closure is not None:
            raise TypeError("AdamW takes no closure")
        for group in self.param_groups:
            by_number: dict[int, list[AdamWTensors]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                create_state(self, parameter=parameter)
                state = self.state[parameter]
                state["step"] += 1
                by_number.setdefault(int(state["step"]), []).append(self._tensors(parameter, group["weight_decay"]))
            for number, tensors in by_number.items():
                step = AdamWStep(group["lr"], *group["betas"], group["eps"], number)
                adamw(tensors, step=step, gradient_scale=gradient_scale)

    def _tensors(self, parameter: torch.nn.Parameter, weight_decay: float) -> AdamWTensors:
        state, copy = self.state[parameter], self._copies.get(parameter)
        first, second = (state[key] for key in MOMENTS)
        return AdamWTensors(
            parameter.detach(), parameter.grad.contiguous(), first, second, weight_decay,
            copy=None if copy is None else copy.detach(),
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
        state["step"] = torch.zeros((), dtype=torch.float32)  # on the host, which needs it for the bias
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
