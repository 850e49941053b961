"""Full fp32 state and gradients of a DeepSpeed engine by parameter name, whatever the ZeRO stage.

DeepSpeed keeps masters and moments as flat pieces; its `safe_*` functions assemble one parameter at a time. Moments
exist only after the first step, so loading creates them first. The attribute names below are of DeepSpeed 0.19.8,
which setup.py pins; the equality tests guard them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ernie5.engine.interface import EngineState, check_names
from ernie5.engine.local import load_buffers, persistent_buffers
from ernie5.optim.adamw import MOMENTS, create_state
from ernie5.parallel.apply import Layout


class DeepSpeedState:
    """Reads and writes the state behind a DeepSpeed engine; every method is collective."""

    def __init__(self, engine: object, *, model: torch.nn.Module, stage: int, layout: Layout) -> None:
        self._engine, self._model, self._stage, self._layout = engine, model, stage, layout
        self.updates = 0
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for master in self._masters():
            create_state(self._inner(), parameter=master)
        if stage in (1, 2):
            self._optimizer()._lazy_init_hp_params_optimizer_state()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Full fp32 gradients, before clipping."""
        return {
            name: self._layout.gather(self._gradient(parameter).float(), name=name).clone()
            for name, parameter in self._names.items()
        }

    def parts(self) -> dict[str, torch.Tensor]:
        """This rank's part of every parameter as the next step will use it, whole within DeepSpeed's partitions."""
        return {name: self._read(parameter, key=None) for name, parameter in self._names.items()}

    def poison_gradient(self) -> None:
        """NaN into the gradient of the smallest parameter, wherever the stage keeps it."""
        from deepspeed.utils import safe_set_full_grad

        parameter = min(self._names.values(), key=lambda p: p.ds_numel if self._stage == 3 else p.numel())
        shape = parameter.ds_shape if self._stage == 3 else parameter.shape
        safe_set_full_grad(parameter, torch.full(shape, torch.nan, device=parameter.device))

    def collect(self, *, magnitudes: torch.Tensor) -> EngineState:
        """Everything on the CPU."""
        parameters, moments = {}, {}
        for name, parameter in self._names.items():
            for key in (None, *self._keys(parameter)):
                whole = self._layout.gather(self._read(parameter, key=key), name=name)
                target, label = (parameters, name) if key is None else (moments, f"{key}/{name}")
                target[label] = whole.to("cpu", torch.float32, copy=True)
        return EngineState(
            parameters=parameters,
            buffers=persistent_buffers(self._model),
            moments=moments,
            updates=self.updates,
            magnitudes=magnitudes.cpu().clone(),
        )

    @torch.no_grad()
    def load(self, state: EngineState) -> None:
        """Write `state` into masters, moments, counters, parameters and buffers after checking names and shapes."""
        own = self.collect(magnitudes=state.magnitudes)
        check_names(state.parameters, expected=own.parameters, what="parameters")
        check_names(state.moments, expected=own.moments, what="optimizer tensors")
        load_buffers(self._model, buffers=state.buffers)
        for name, parameter in self._names.items():
            self._write(parameter, value=self._layout.cut(state.parameters[name], name=name), key=None)
            for key in self._keys(parameter):
                self._write(parameter, value=self._layout.cut(state.moments[f"{key}/{name}"], name=name), key=key)
        if self._stage == 3:
            for group in range(len(self._optimizer().fp16_groups)):
                self._optimizer()._reassign_or_swap_out_partitioned_parameters(group)
        for master in self._masters():
            entry = self._inner().state[master]
            if "step" in entry:
                entry["step"].fill_(state.updates)
        self.updates = state.updates

    def _keys(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        if self._stage == 0:
            return tuple(key for key in self._inner().state[parameter] if key != "step")
        return MOMENTS

    def _read(self, parameter: torch.nn.Parameter, *, key: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            return parameter.detach() if key is None else self._inner().state[parameter][key]
        if key is None:
            return safe_get_full_fp32_param(parameter).detach()
        return safe_get_full_optimizer_state(parameter, key)

    def _write(self, parameter: torch.nn.Parameter, *, value: torch.Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(parameter.device)
        if self._stage == 0:
            (parameter if key is None else self._inner().state[parameter][key]).copy_(value)
        elif self._stage == 3:
            self._write_piece(parameter, value=value, key=key)
        elif key is not None:
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self._stage == 3:
            return self._optimizer().get_fp32_grad_for_param(parameter)
        return parameter.grad if self._stage == 0 else parameter.get_full_hp_grad()

    def _write_piece(self, parameter: torch.nn.Parameter, *, value: torch.Tensor, key: str | None) -> None:
        """This rank's piece, padded: safe_set_full_* fails where ranks do not divide the number of elements."""
        size = parameter.ds_tensor.numel()
        ranks = dist.get_world_size(parameter.ds_process_group)
        pieces = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel())).view(ranks, size)
        self._optimizer().set_local_hp_param(pieces[dist.get_rank(parameter.ds_process_group)], parameter, key)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer

    def _inner(self) -> torch.optim.Optimizer:
        """The client's optimizer inside DeepSpeed's wrapper."""
        return self._optimizer() if self._stage == 0 else self._optimizer().optimizer

    def _masters(self) -> list[torch.Tensor]:
        """The tensors that the client's optimizer steps: whole parameters, or flat fp32 pieces."""
        if self._stage == 3:
            return list(self._optimizer().fp32_partitioned_groups_flat)
        return [parameter for group in self._inner().param_groups for parameter in group["params"]]
