"""The gradient norm of a ZeRO optimizer that counts every element of the model once, whatever the layout.

DeepSpeed completes the norm of each optimizer group over dp x cp and the ranks of its `mpu`. That holds where every
group is partitioned over dp x cp. Experts are partitioned over their replicas, which with tensor parallelism lie on
tensor-parallel ranks too, and pipeline stages share weights. So the sums of squares are taken here, of the very pieces
that DeepSpeed steps, and DeepSpeed clips by the root of their one sum over all ranks. (Its optimizer for stage 1 in
bf16 keeps whole fp32 gradients and asks no method of its own for the norm: the engine clips those, as in stage 0.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ernie5.optim.clip import global_norm
from ernie5.parallel.apply import Layout
from ernie5.parallel.collectives import all_reduce

PARTITION_AXES = ("dp_cp", "edp")
"""The axes over which ZeRO partitions: their ranks hold pieces of a parameter, not copies."""


def own_norm(engine: object, *, parameters: Mapping[str, torch.nn.Parameter], layout: Layout) -> None:
    """Let the ZeRO optimizer of DeepSpeed's `engine` clip by the norm that is taken here; `parameters` by name."""
    norm = _Norm(engine, parameters=parameters, layout=layout)
    if engine.zero_optimization_partition_weights():
        engine.optimizer._get_norm_groups = lambda: [norm()]
    else:
        engine.optimizer.scaled_global_norm = lambda norm_type=2: norm()


def whole_gradients(
    engine: object, *, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor] | None:
    """The flat fp32 gradients by name that DeepSpeed's optimizer for stage 1 in bf16 adds up beside `parameters`, None
    for another optimizer."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return None
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    pairs = (pair for group, gradients in groups for pair in zip(group, gradients, strict=True))
    return {names[id(parameter)]: gradient for parameter, gradient in pairs}


class _Norm:
    def __init__(self, engine: object, *, parameters: Mapping[str, torch.nn.Parameter], layout: Layout) -> None:
        self._optimizer, self._layout, self._device = engine.optimizer, layout, engine.device
        self._is_on_host = engine.zero_use_cpu_optimizer()
        whole = not engine.zero_optimization_partition_weights()
        self._groups = self._optimizer.params_in_partition if whole else self._optimizer.fp16_groups
        self._counted = {
            id(parameter)
            for name, parameter in parameters.items()
            if layout.is_counted_here(name, partition_axes=PARTITION_AXES)
        }

    def __call__(self) -> torch.Tensor:
        """0-d fp32, the same on every rank; collective."""
        pieces = list(self._norms() if self._is_on_host else self._pieces())
        norm = global_norm(
            pieces or [torch.zeros(1, device=self._device)],
            reduce=lambda squares: all_reduce(squares.to(self._device), axis=self._layout.state.world),
        )
        return norm.to(self._optimizer.device)

    def _pieces(self) -> Iterator[torch.Tensor]:
        """The reduced gradients that this rank steps and counts."""
        for index, group in enumerate(self._groups):
            found = (g for g in self._optimizer.averaged_gradients[index] if "_zero_padding" not in vars(g))
            for piece, parameter in zip(found, group, strict=False):  # the last piece may be padding without a mark
                if id(parameter) in self._counted:
                    yield piece

    def _norms(self) -> Iterator[torch.Tensor]:
        """The norms of the same, which DeepSpeed takes in backward where gradients go to the host."""
        norms = self._optimizer.norm_for_param_grads
        for parameter in (parameter for group in self._groups for parameter in group):
            key = self._optimizer.get_param_id(parameter)
            if id(parameter) in self._counted and key in norms:
                yield torch.as_tensor(norms[key], device=self._device).float().view(1)
