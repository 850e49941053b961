"""Telling DeepSpeed which parameters are experts and over which ranks they are spread.

DeepSpeed 0.19.8 knows experts of its own classes. What it needs for ours was found by reading and by trying, and the
layout table guards it: expert and expert-data-parallel groups under one name; marks on the parameters; for stages 1
and 2 a module of a class derived from its MoE (else it ignores the marks) and optimizer groups of experts alone; for
stage 3 no such module (it refuses) but three attributes, without which rank 0's experts overwrite all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ernie5.optim.groups import ParameterGroup
from ernie5.parallel.apply import Layout
from ernie5.parallel.state import real_group


class ExpertPlacement:
    """Prepares model, groups and step for DeepSpeed; does nothing where every rank holds all of every expert, or none
    of any."""

    def __init__(self, layout: Layout, *, stage: int) -> None:
        block = layout.state.dims.ep * layout.state.dims.etp
        self._layout, self._stage = layout, stage
        self._names = tuple(filter(layout.is_here, layout.experts)) if block > 1 else ()
        self._group_name = f"ep_size_{block}"
        if block > 1:  # also on a pipeline stage without experts: groups are made by all ranks
            self._replicas = _register_groups(layout, name=self._group_name)

    def mark(self, model: torch.nn.Module) -> None:
        """Mark the expert parameters of `model`, before DeepSpeed sees it."""
        parameters = dict(model.named_parameters())
        for name in self._names:
            parameter = parameters[name]
            parameter.allreduce, parameter.group_name = False, self._group_name
            if self._stage == 3:
                parameter.ds_zero_placement_family = "autoep_expert"
                parameter.ds_zero_partition_group_name = self._group_name
                parameter.ds_zero_partition_process_group = self._replicas

    def split_groups(self, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
        """Optimizer groups in which experts are by themselves, called as DeepSpeed looks for them."""
        experts = set(self._names)
        result = []
        for group in groups:
            plain = _subset(group, keep=[name not in experts for name in group.names], name=group.name)
            routed = _subset(group, keep=[name in experts for name in group.names], name=self._group_name)
            result += [part for part in (plain, routed) if part.names]
        return result

    def holds(self, group: ParameterGroup) -> bool:
        """Whether `group` is one of experts that ranks share out."""
        return bool(self._names) and group.name == self._group_name

    def mark_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the flag by which DeepSpeed knows an expert group."""
        for group in optimizer.param_groups:
            group["moe"] = bool(self._names) and group["name"] == self._group_name

    def announce(self, step: torch.nn.Module) -> None:
        """Add the module that makes DeepSpeed handle experts in stages 0 to 2; it has neither weights nor a forward."""
        if self._names and self._stage < 3:
            step.add_module("expert_placement", _make_announcement())


def _subset(group: ParameterGroup, *, keep: list[bool], name: str) -> ParameterGroup:
    pairs = [pair for pair, kept in zip(zip(group.names, group.parameters, strict=True), keep, strict=True) if kept]
    return dataclasses.replace(
        group, name=name, names=tuple(pair[0] for pair in pairs), parameters=tuple(pair[1] for pair in pairs)
    )


def _register_groups(layout: Layout, *, name: str) -> dist.ProcessGroup:
    """Enter the groups of one block of experts and of an expert's replicas into DeepSpeed's tables."""
    from deepspeed.utils import groups

    state = layout.state
    block = real_group(state.block, all_ranks=state.dims.groups("block"))
    replicas = real_group(state.edp, all_ranks=state.dims.groups("edp"))
    groups._EXPERT_PARALLEL_GROUP[name] = block
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(state.block.ranks)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = replicas
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(state.edp.ranks)
    return replicas


def _make_announcement() -> torch.nn.Module:
    from deepspeed.moe.layer import MoE

    class Announcement(MoE):
        """Recognised by its base class alone."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.num_experts = 1

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups exist already."""

    return Announcement()
