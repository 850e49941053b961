"""Telling DeepSpeed which parameters it must reduce and partition apart from the rest, and over which ranks.

DeepSpeed 0.19.8 knows experts of its own classes. What it needs for ours was found by reading and by trying, and the
layout table guards it: expert and expert-data-parallel groups under one name; marks on the parameters; for stages 1
and 2 a module of a class derived from its MoE (else it ignores the marks) and optimizer groups of experts alone; for
stage 3 no such module (it refuses) but three attributes, without which rank 0's experts overwrite all others.

The same machinery keeps apart, in stages 0 to 2, parameters of which tensor-parallel ranks hold parts of different
sizes (the classes of a head need not divide). A ring of more than two ranks adds up an element in an order that depends
on its place in the buffer; were those parameters in the buffer of the others, copies of one weight would lie at
different places on two ranks and drift apart by rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ernie5.optim.groups import GROUP_KINDS, ParameterGroup
from ernie5.parallel.apply import Layout
from ernie5.parallel.state import real_group


@dataclasses.dataclass(frozen=True)
class Apart:
    """Parameters that DeepSpeed handles by themselves.

    names: those on this rank; replicas: the ranks that hold the same part of them; kind: the optimizer group that they
    are taken out of, None for every one.
    """

    names: frozenset[str]
    replicas: dist.ProcessGroup
    is_expert: bool
    kind: str | None = None


class KeptApart:
    """Prepares groups and step for DeepSpeed: experts by themselves, and what is cut unevenly. Does nothing where every
    rank holds all of every expert, or none of any, and equal parts of all else."""

    def __init__(self, layout: Layout, *, stage: int) -> None:
        self._stage = stage
        # by the name of their optimizer group, in which DeepSpeed expects a number as third part; groups are made by
        # all ranks, also on a pipeline stage without such parameters
        self._apart: dict[str, Apart] = {}
        block = layout.state.dims.ep * layout.state.dims.etp
        if block > 1:
            self._apart[f"ep_size_{block}"] = _experts(layout)
        if stage < 3 and layout.state.dp_cp.size > 2:  # two numbers have one sum, in either order
            self._apart.update(_uneven(layout))
        for name, apart in self._apart.items():
            _register(layout, name=name, apart=apart)
        self._is_needed = any(apart.names for apart in self._apart.values())

    def split_groups(self, groups: Sequence[ParameterGroup]) -> list[ParameterGroup]:
        """Optimizer groups in which what DeepSpeed handles by itself is by itself, its parameters marked."""
        result = []
        for group in groups:
            homes = [self._home(name, kind=group.name) for name in group.names]
            result.append(_subset(group, keep=[home is None for home in homes], name=group.name))
            for own, apart in self._apart.items():
                result.append(_subset(group, keep=[home == own for home in homes], name=own))
                for parameter in result[-1].parameters:
                    self._mark(parameter, name=own, apart=apart)
        return [group for group in result if group.names]

    def mark_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the flag by which DeepSpeed knows an expert group."""
        for group in optimizer.param_groups:
            group["moe"] = group["name"] in self._apart

    def announce(self, step: torch.nn.Module) -> None:
        """Add the module that makes DeepSpeed handle them apart in stages 0 to 2; it has no weights and no forward."""
        if self._is_needed and self._stage < 3:
            step.add_module("kept_apart", _make_announcement())

    def _home(self, name: str, *, kind: str) -> str | None:
        """The group apart that takes the parameter out of the group of that kind."""
        return next((own for own, apart in self._apart.items() if name in apart.names and apart.kind in (None, kind)),
                    None)

    def _mark(self, parameter: torch.nn.Parameter, *, name: str, apart: Apart) -> None:
        parameter.allreduce, parameter.group_name = False, name
        if self._stage == 3:
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = name
            parameter.ds_zero_partition_process_group = apart.replicas


def _experts(layout: Layout) -> Apart:
    state = layout.state
    replicas = real_group(state.edp, all_ranks=state.dims.groups("edp"))
    return Apart(frozenset(filter(layout.is_here, layout.experts)), replicas, is_expert=True)


def _uneven(layout: Layout) -> dict[str, Apart]:
    """A group of its own ranks, which are those of all other weights, makes DeepSpeed reduce them by themselves."""
    state = layout.state
    names = frozenset(filter(layout.is_uneven, layout.shards)).difference(layout.experts)
    if not names:
        return {}
    again = {ranks: dist.new_group(list(ranks)) for ranks in state.dims.groups("dp_cp")}[state.dp_cp.ranks]
    here = frozenset(filter(layout.is_here, names))
    return {f"ep_size_1_uneven_{kind}": Apart(here, again, is_expert=False, kind=kind) for kind in GROUP_KINDS}


def _register(layout: Layout, *, name: str, apart: Apart) -> None:
    """Enter the ranks among which parameters are spread, and their replicas, into DeepSpeed's tables."""
    from deepspeed.utils import groups

    state = layout.state
    spread, replicas = (state.block, state.edp) if apart.is_expert else (state.tp, state.dp_cp)
    every = state.dims.groups("block" if apart.is_expert else "tp")
    groups._EXPERT_PARALLEL_GROUP[name] = real_group(spread, all_ranks=every)
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = list(spread.ranks)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = apart.replicas
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(replicas.ranks)


def _subset(group: ParameterGroup, *, keep: list[bool], name: str) -> ParameterGroup:
    pairs = [pair for pair, kept in zip(zip(group.names, group.parameters, strict=True), keep, strict=True) if kept]
    return dataclasses.replace(
        group, name=name, names=tuple(pair[0] for pair in pairs), parameters=tuple(pair[1] for pair in pairs)
    )


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
