"""Initial values under ZeRO-3: each parameter is drawn, handed to DeepSpeed, which keeps this rank's piece of it, and
forgotten before the next one is drawn."""

from __future__ import annotations

import torch

from ernie5.engine.deepspeed_topology import Topology
from ernie5.parallel.apply import Layout, draw_part


def partition_parameters(
    model: torch.nn.Module, *, layout: Layout, config: dict[str, object], topology: Topology | None, dtype: torch.dtype
) -> None:
    """Turn the stand-ins of `model` (`make_parts`), groups and marks of experts being set, into partitioned parameters
    of `dtype`. config: DeepSpeed's own. Collective.

    DeepSpeed would do so with a whole model at once (`deepspeed.zero.Init` of it); it takes single parameters as well.
    """
    import deepspeed

    first = None
    for name, parameter in model.named_parameters():
        parameter.data = draw_part(model, name=name, layout=layout, dtype=torch.float32).to(dtype)
        if first is not None:
            first.convert_to_zero_parameters(param_list=[parameter])
            continue
        first, alone = parameter, torch.nn.ParameterList([parameter])
        group = None if topology is None else topology.get_data_parallel_group()
        deepspeed.zero.Init(
            module=alone, config_dict_or_path=config, mpu=topology, data_parallel_group=group, dtype=dtype
        )


def move_buffers(model: torch.nn.Module, *, device: torch.device) -> None:
    """Move the buffers alone: stand-ins would become as large as what they stand for."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
