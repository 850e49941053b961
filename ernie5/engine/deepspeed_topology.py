"""Tensor and pipeline parallelism as DeepSpeed sees them: which ranks share data, and which share a model."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ernie5.parallel.apply import Layout
from ernie5.parallel.state import real_group
from ernie5.parallel.tensor import sum_gradients_over


class Topology:
    """The `mpu` object of DeepSpeed: ZeRO partitions over dp x cp; the ranks of pp x tp hold the parts of one model and
    skip a step together."""

    def __init__(self, layout: Layout) -> None:
        state = layout.state
        self._tp, self._data, self._model = state.tp, state.dp_cp, state.model
        self._tp_group = real_group(state.tp, all_ranks=state.dims.groups("tp"))
        self._data_group = real_group(state.dp_cp, all_ranks=state.dims.groups("dp_cp"))
        self._model_group = real_group(state.model, all_ranks=state.dims.groups("model"))

    def get_model_parallel_rank(self) -> int:
        """Place in the pp x tp group."""
        return self._model.coordinate

    def get_model_parallel_world_size(self) -> int:
        """Ranks of the pp x tp group."""
        return self._model.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The pp x tp group."""
        return self._model_group

    def get_tensor_model_parallel_rank(self) -> int:
        """Place in the tp group."""
        return self._tp.coordinate

    def get_tensor_model_parallel_world_size(self) -> int:
        """Ranks of the tp group."""
        return self._tp.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The tp group."""
        return self._tp_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of the tp group."""
        return self._tp.ranks[0]

    def get_data_parallel_rank(self) -> int:
        """Place in the dp x cp group."""
        return self._data.coordinate

    def get_data_parallel_world_size(self) -> int:
        """Ranks of the dp x cp group."""
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The dp x cp group."""
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the dp x cp group."""
        return list(self._data.ranks)


def place_parts(model: torch.nn.Module, *, layout: Layout) -> Topology | None:
    """Mark the cut parameters (DeepSpeed's norm, which nothing asks for any more, wants one on every rank), sum what tp
    ranks share out among them, and enter the topology into DeepSpeed's module (None without tp and pp: the engine
    before this one may have left its own there).

    Routed experts see a share of a tp rank's tokens. Where they are spread over no ranks they are copies, and their
    gradients are summed over tp; else the replicas whose gradients DeepSpeed sums hold all of these shares.
    """
    from deepspeed.utils import groups

    state = layout.state
    groups.mpu = None
    if state.model.size == 1:
        return None
    for name, parameter in model.named_parameters():
        if any(cut.axis in ("tp", "keys") for cut in layout.shards[name].cuts):
            parameter.model_parallel = True
    for layer in model.moe_layers() if state.tp.size > 1 and state.block.size == 1 else ():
        sum_gradients_over(layer.experts, axis=state.tp)
    return Topology(layout)
