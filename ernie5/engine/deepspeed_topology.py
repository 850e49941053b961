"""Tensor parallelism as DeepSpeed sees it: which ranks share data, which share a model, what counts once in a norm."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ernie5.parallel.apply import Layout
from ernie5.parallel.state import Axis, real_group
from ernie5.parallel.tensor import sum_gradients_over


class Topology:
    """The `mpu` object of DeepSpeed: ZeRO partitions over dp x cp, norms are completed over tp."""

    def __init__(self, layout: Layout) -> None:
        state = layout.state
        self._tp, self._data = state.tp, state.dp_cp
        self._tp_group = real_group(state.tp, all_ranks=state.dims.groups("tp"))
        self._data_group = real_group(state.dp_cp, all_ranks=state.dims.groups("dp_cp"))

    def get_model_parallel_rank(self) -> int:
        """Place in the tp group."""
        return self._tp.coordinate

    def get_model_parallel_world_size(self) -> int:
        """Ranks of the tp group."""
        return self._tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tp group."""
        return self._tp_group

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


def place_tensor(model: torch.nn.Module, *, layout: Layout) -> Topology | None:
    """Mark the cut parameters of `model`, sum what tp ranks share out among them, and enter the topology into
    DeepSpeed's module (None without tp: the engine before this one may have left its own there).

    Routed experts stand whole on every tp rank and see a share of its tokens, so their gradients are summed over tp.
    """
    from deepspeed.utils import groups

    axis: Axis = layout.state.tp
    groups.mpu = None
    if axis.size == 1:
        return None
    for name, parameter in model.named_parameters():
        if any(cut.axis == "tp" for cut in layout.shards[name].cuts):
            parameter.model_parallel = True
    for layer in model.moe_layers():
        sum_gradients_over(layer.experts, axis=axis)
    return Topology(layout)
