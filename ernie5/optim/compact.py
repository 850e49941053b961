"""AdamW with less state: moments of 8 bits, and bf16 weights that are rounded at random instead of having fp32 masters.

Bytes per weight, gradient left out: 14 with masters and fp32 moments (2 + 4 + 8), 8 with moments of 8 bits, 10 without
masters, 4 with both, and 1/32 for the scales of 8-bit moments.
"""

from __future__ import annotations

import torch

from ernie5.optim.adamw import MOMENTS, KernelAdamW
from ernie5.optim.config import OptimConfig
from ernie5_kernels.adamw_compact import AdamWStep, CompactTensors, Moment, adamw_compact, count_blocks


class CompactAdamW(KernelAdamW):
    """AdamW over bf16 weights (rounded at random) or fp32 masters, with state from the start.

    State with 8 bits: `exp_avg_codes`, uint8 in the parameter's shape, and `exp_avg_scales`, fp32 [blocks of 256
    elements]; the same of `exp_avg_sq`. Without: torch's names. copies: the bf16 weight under an fp32 master.
    """

    def _begin(self, config: OptimConfig) -> None:
        self._is_coded = config.moments == "8bit"
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._seeds = {parameter: index for index, parameter in enumerate(parameters)}
        for parameter in parameters:
            self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **self._zeros(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: torch.Tensor | None = None) -> None:
        """Update every parameter that has a gradient, times `gradient_scale` (one number, such as a clip factor)."""
        if closure is not None:
            raise TypeError("CompactAdamW takes no closure")
        by_step: dict[AdamWStep, list[CompactTensors]] = {}  # groups differ in decay, so that all share one launch
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                count = self.state[parameter]["step"]
                count += 1
                step = AdamWStep(group["lr"], *group["betas"], group["eps"], int(count))
                by_step.setdefault(step, []).append(self._tensors(parameter, group["weight_decay"]))
        for step, tensors in by_step.items():
            adamw_compact(tensors, step=step, gradient_scale=gradient_scale)

    def _tensors(self, parameter: torch.nn.Parameter, weight_decay: float) -> CompactTensors:
        state, copy = self.state[parameter], self._copies.get(parameter)
        first, second = (self._moment(state, name=name) for name in MOMENTS)
        return CompactTensors(
            parameter.detach(), parameter.grad.contiguous(), first, second, weight_decay,
            seed=self._seeds[parameter], copy=None if copy is None else copy.detach(),
        )

    def _zeros(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=parameter.device)

        if not self._is_coded:
            return {name: zeros(*parameter.shape, dtype=torch.float32) for name in MOMENTS}
        blocks = count_blocks(parameter.numel())
        codes = {f"{name}_codes": zeros(*parameter.shape, dtype=torch.uint8) for name in MOMENTS}
        return {**codes, **{f"{name}_scales": zeros(blocks, dtype=torch.float32) for name in MOMENTS}}

    def _moment(self, state: dict[str, torch.Tensor], *, name: str) -> Moment:
        return Moment(state[f"{name}_codes"], state[f"{name}_scales"]) if self._is_coded else Moment(state[name])
