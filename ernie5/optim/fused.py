"""AdamW by our own kernel: gradients in fp32 or in the bf16 weights' dtype, clipping and bf16 weights in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ernie5.optim.adamw import MOMENTS
from ernie5.optim.clip import clip_factor, scale_gradients
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5_kernels.adamw import AdamWStep, AdamWTensors, adamw


class FusedAdamW(torch.optim.Optimizer):
    """AdamW over fp32 masters, state from the start, named as torch's.

    copies: the bf16 weight under a master, written in the same pass. A master's gradient may be fp32 or bf16 (its
    `grad_dtype` is lifted here), so that a step of one micro-batch never makes an fp32 copy of it.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        *,
        config: OptimConfig,
        copies: Mapping[torch.nn.Parameter, torch.nn.Parameter],
    ) -> None:
        super().__init__(
            [{"params": list(g.parameters), "weight_decay": g.weight_decay, "name": g.name} for g in groups],
            {"lr": config.learning_rate},
        )
        self._config, self._copies = config, dict(copies)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad_dtype = None
                state = self.state[parameter]
                state["step"] = torch.zeros((), dtype=torch.float32)  # on the host, which needs it for the bias
                for key in MOMENTS:
                    state[key] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: torch.Tensor | None = None) -> None:
        """Update every master that has a gradient, times `gradient_scale` (one fp32 number, such as a clip factor)."""
        if closure is not None:
            raise TypeError("FusedAdamW takes no closure")
        for group in self.param_groups:
            by_number: dict[int, list[AdamWTensors]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                by_number.setdefault(int(state["step"]), []).append(self._tensors(parameter, group["weight_decay"]))
            for number, tensors in by_number.items():
                step = AdamWStep(
                    group["lr"], self._config.beta1, self._config.beta2, self._config.epsilon, number
                )
                adamw(tensors, step=step, gradient_scale=gradient_scale)

    def _tensors(self, parameter: torch.nn.Parameter, weight_decay: float) -> AdamWTensors:
        state, copy = self.state[parameter], self._copies.get(parameter)
        first, second = (state[key] for key in MOMENTS)
        return AdamWTensors(
            parameter, parameter.grad.contiguous(), first, second, weight_decay,
            copy=None if copy is None else copy.detach(),
        )


def step_clipped(
    optimizer: torch.optim.Optimizer, *, gradients: list[torch.Tensor], norm: torch.Tensor, max_norm: float
) -> None:
    """One step with gradients of global `norm` clipped to `max_norm` (0: not): inside the kernel, or in place."""
    if isinstance(optimizer, FusedAdamW):
        optimizer.step(gradient_scale=clip_factor(norm, max_norm=max_norm) if max_norm > 0 else None)
    else:
        scale_gradients(gradients, norm=norm, max_norm=max_norm)
        optimizer.step()
