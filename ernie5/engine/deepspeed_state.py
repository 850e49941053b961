"""The fp32 state and the gradients of a DeepSpeed engine by parameter name, whatever the ZeRO stage.

DeepSpeed keeps masters and moments as flat pieces: `slices` says which boxes of which tensors they are, `safe_*`
functions of DeepSpeed assemble one parameter at a time for comparisons. Moments exist only after the first step, so
they are created at the start. The attribute names below are of DeepSpeed 0.19.8,
which setup.py pins; the equality tests guard them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ernie5.engine.deepspeed_norm import PARTITION_AXES
from ernie5.engine.deepspeed_nvme import map_tensors
from ernie5.engine.interface import MOMENT, PARAMETER, StateSlice
from ernie5.engine.slices import buffer_slices, part_slices
from ernie5.optim.adamw import create_state
from ernie5.optim.flat_muon import FlatMuon
from ernie5.parallel.apply import Layout
from ernie5.parallel.held import held_parts, written_names


class DeepSpeedState:
    """Reads and writes the state behind a DeepSpeed engine; all methods but `slices` are collective."""

    def __init__(
        self, engine: object, *, model: torch.nn.Module, stage: int, layout: Layout, files: Path | None = None
    ) -> None:
        """files: the folder in which masters and moments are to be (stage 3)."""
        self._engine, self._model, self._stage, self._layout = engine, model, stage, layout
        self._names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inner = self._inner()
        if isinstance(inner, FlatMuon):
            inner.materialise()
            if stage == 3:
                self._locate_pieces(inner)
        for master in self._masters():
            create_state(inner, parameter=master)
            if files is not None:
                moments = (value for key, value in inner.state[master].items() if key != "step")
                map_tensors((master, *moments), folder=files)
        if stage in (1, 2):
            self._optimizer()._lazy_init_hp_params_optimizer_state()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Full fp32 gradients of all pipeline stages, before clipping."""
        found = {}
        for name in self._layout.shards:
            own = self._gradient(self._names[name]).float() if name in self._names else None
            found[name] = self._layout.collect(own, name=name, dtype=torch.float32, device=self._engine.device).clone()
        return found

    def parts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """By name, this rank's part of every parameter as the next step will use it: made whole out of DeepSpeed's
        pieces one by one, for a rank has no room for all of them."""
        for name, parameter in self._names.items():
            yield name, self._read(parameter, key=None)

    def poison_gradient(self) -> None:
        """NaN into the gradient of the smallest parameter, wherever the stage keeps it; where gradients are on the
        host, into the norms that DeepSpeed took of them in backward, which alone it looks at."""
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        if self._engine.zero_use_cpu_optimizer():
            norms = self._optimizer().norm_for_param_grads
            norms.update({key: torch.tensor(torch.nan) for key in norms})
            return
        if self._stage == 3:  # by pieces: a whole one does not reach over padding, where NaN would stay for good
            parameter = min(self._names.values(), key=lambda p: p.ds_numel)
            piece = torch.zeros(parameter.partition_numel(), device=parameter.device)
            first = dist.get_rank(parameter.ds_process_group) * piece.numel()
            piece[: max(0, parameter.ds_numel - first)] = torch.nan
            safe_set_local_grad(parameter, piece)
            return
        parameter = min(self._names.values(), key=torch.Tensor.numel)
        safe_set_full_grad(parameter, torch.full(parameter.shape, torch.nan, device=parameter.device))

    def forget_gradients(self) -> None:
        """After a step that was not applied. Stages 1 and 2 in bf16 with state on the host would keep what they have
        added up, and add the next step's gradients to it."""
        if self._stage < 3:
            sums = self._optimizer().averaged_gradients
            sums.update(dict.fromkeys(sums))

    def slices(self) -> Iterator[StateSlice]:
        """This rank's masters and moments where DeepSpeed keeps them, and the buffers; no collective."""
        parts = held_parts(self._layout)
        partition = PARTITION_AXES if self._stage else ()
        written = written_names(self._layout, parts=parts, partition_axes=partition)
        for name, parameter in self._names.items():
            for key in (None, *self._keys(parameter)):
                flat, first = self._own_elements(parameter, key=key)
                yield from part_slices(
                    flat,
                    kind=PARAMETER if key is None else MOMENT,
                    key=name if key is None else f"{key}/{name}",
                    held=parts[name],
                    is_written=name in written,
                    first=first,
                )
        yield from buffer_slices(self._model, is_written=self._layout.state.world.coordinate == 0)

    @torch.no_grad()
    def adopt(self, *, updates: int) -> None:
        """Parameters follow the masters, counters are set."""
        if self._stage in (1, 2):
            self._optimizer().update_lp_params()
        if self._stage == 3:
            for group in range(len(self._optimizer().fp16_groups)):
                self._optimizer()._reassign_or_swap_out_partitioned_parameters(group)
        for master in self._masters():
            entry = self._inner().state[master]
            if "step" in entry:
                entry["step"].fill_(updates)

    def _keys(self, parameter: torch.nn.Parameter) -> tuple[str, ...]:
        if self._stage == 0:
            return tuple(key for key in self._inner().state[parameter] if key != "step")
        if self._stage == 3:
            group, _, _ = self._optimizer().grad_position[self._optimizer().get_param_id(parameter)]
            return tuple(key for key in self._inner().state[self._masters()[group]] if key != "step")
        return tuple(parameter._hp_mapping.get_optim_state_keys()) if parameter._hp_mapping is not None else ()

    def _read(self, parameter: torch.nn.Parameter, *, key: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            return parameter.detach() if key is None else self._inner().state[parameter][key]
        if key is None:
            return safe_get_full_fp32_param(parameter).detach()
        return safe_get_full_optimizer_state(parameter, key)

    def _own_elements(self, parameter: torch.nn.Parameter, *, key: str | None) -> tuple[torch.Tensor, int]:
        """The elements of a parameter's master (or of its moment `key`) that this rank keeps, as a flat view, and the
        place of the first of them in the flat parameter."""
        if self._stage == 0:
            return (parameter if key is None else self._inner().state[parameter][key]).detach().view(-1), 0
        if self._stage == 3:
            flat, _ = self._optimizer()._get_fp32_opt_state_partition(parameter, True, key)
            first = dist.get_rank(parameter.ds_process_group) * flat.numel()
            return flat.detach()[: max(0, parameter.ds_numel - first)], first  # the last pieces are padded
        fragment = parameter._hp_mapping
        if fragment is None:
            return torch.empty(0), 0
        return fragment.get_hp_fragment(key).detach().view(-1), fragment.lp_fragment_address.start

    def _gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if self._stage == 3:
            return self._optimizer().get_fp32_grad_for_param(parameter)
        return parameter.grad if self._stage == 0 else parameter.get_full_hp_grad()

    def _locate_pieces(self, inner: FlatMuon) -> None:
        """Stage 3 makes a flat master of each of its sub-groups: a piece of every parameter in it."""
        names = {id(parameter): name for name, parameter in self._names.items()}
        for master, members in zip(self._masters(), self._optimizer().fp16_groups, strict=True):
            inner.locate(
                master, names=[names[id(one)] for one in members], lengths=[one.partition_numel() for one in members]
            )

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
