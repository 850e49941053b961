"""From the outline of a model, which has names and shapes alone, to one rank's part of it, in one visible order.

The layout is planned from shapes. Then each parameter of this rank is drawn by itself, from the random stream that is
its own on every layout, and of the stream only this rank's part is kept: all layouts start from identical weights, and
no rank ever holds a whole model. What is cut where stands in `model/shard_plan.py`; names stay global, shapes become
local.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch

from ernie5.model.interfaces import KeptIndices
from ernie5.model.shard_plan import Placement, placements_of
from ernie5.objectives.next_token import TextLoss
from ernie5.parallel.collectives import all_gather, broadcast, even_sizes, own_part
from ernie5.parallel.config import CHUNK_TOKENS, ParallelConfig
from ernie5.parallel.context import cut_batch, install_context
from ernie5.parallel.dispatchers import make_dispatcher
from ernie5.parallel.halves import Halves
from ernie5.parallel.stages import StagePlan, plan_stages
from ernie5.parallel.state import Axis, ParallelState
from ernie5.parallel.tensor import VocabularyParallelLoss, install_tensor
from ernie5.parallel.token_split import Splitter
from ernie5.records import Batch
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class Cut:
    """One cut of a tensor: `axis` cuts dim `dim`, which is made of `fused` equal parts, each cut by itself, as evenly
    as it goes (rows of a head need not be divisible)."""

    dim: int
    axis: str
    fused: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one rank holds of a parameter.

    shape: of the whole tensor; cuts: applied in order; sum_axes: the axes over which its gradients are summed;
    copy_axes: the axes whose ranks hold equal copies, of which the rank at coordinate 0 counts in norms; stages: the
    pipeline stages that hold it, which sum its gradients too, and of which the first counts.
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    sum_axes: tuple[str, ...]
    copy_axes: tuple[str, ...]
    stages: tuple[int, ...]


@dataclasses.dataclass
class Seam:
    """One exchanged part of the model: `owner.attribute` is `parallel` in the cut model and `plain` in a whole one."""

    owner: torch.nn.Module
    attribute: str
    plain: object
    parallel: object


@dataclasses.dataclass(frozen=True)
class Absence:
    """A parameter of other stages: `owner.attribute` is None in the cut model."""

    owner: torch.nn.Module
    attribute: str


class Layout:
    """How a model is spread: the sections of each stage, the shard of every parameter by name (those of all stages),
    how rows are split over context ranks, and the seams that were exchanged. stages: None for a layout that does not
    run; context_chunk: as in ParallelConfig; is_one_length: as in Splitter."""

    def __init__(
        self, state: ParallelState, *, shards: dict[str, Shard], stages: StagePlan | None = None,
        context_chunk: int = CHUNK_TOKENS, is_one_length: bool = False,
    ) -> None:
        self.state, self.stages, self.shards = state, stages, shards
        self.splitter = Splitter(state.axis("cp").size, context_chunk, is_one_length)
        self._seams: list[Seam] = []
        self._absent: dict[str, Absence] = {}

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the parameters that are spread over the expert grid."""
        return tuple(name for name, shard in self.shards.items() if "edp" in shard.copy_axes)

    def is_counted_here(self, name: str, *, partition_axes: Collection[str] = ()) -> bool:
        """Whether this rank is the one of all equal copies that counts in a norm. partition_axes: axes whose ranks do
        not hold copies after all, because an optimizer is partitioned over them."""
        copies = [axis for axis in self.shards[name].copy_axes if axis not in partition_axes]
        return self.is_first_stage(name) and all(self.state.axis(axis).coordinate == 0 for axis in copies)

    def is_first_stage(self, name: str) -> bool:
        """Whether this rank's stage is the first that holds the parameter: it counts and saves it."""
        return self.state.axis("pp").coordinate == self.shards[name].stages[0]

    def is_uneven(self, name: str) -> bool:
        """Whether some ranks hold a larger part of the parameter than others."""
        shard = self.shards[name]
        rows = ((shard.shape[cut.dim] // cut.fused, self.state.axis(cut.axis).size) for cut in shard.cuts)
        return any(count % ranks for count, ranks in rows)

    def is_here(self, name: str) -> bool:
        """Whether this rank's stage holds the parameter."""
        return self.state.axis("pp").coordinate in self.shards[name].stages

    def sum_axes(self, name: str) -> tuple[Axis, ...]:
        """The axes over which gradients of `name` are summed."""
        return tuple(self.state.axis(axis) for axis in self.shards[name].sum_axes)

    def cut(self, whole: torch.Tensor, *, name: str) -> torch.Tensor:
        """This rank's contiguous part of a whole tensor."""
        part = whole
        for cut in self.shards[name].cuts:
            part = self._cut_once(part, cut=cut, dim=cut.dim)
        return part.contiguous()

    def kept_indices(self, name: str) -> KeptIndices:
        """Which indices of each dim this rank's part of a parameter has."""
        shard = self.shards[name]
        by_dim = {cut.dim: cut for cut in shard.cuts}
        return tuple(
            self._cut_once(torch.arange(size), cut=by_dim[dim], dim=0) if dim in by_dim else None
            for dim, size in enumerate(shard.shape)
        )

    def _cut_once(self, whole: torch.Tensor, *, cut: Cut, dim: int) -> torch.Tensor:
        axis = self.state.axis(cut.axis)
        pieces = whole.unflatten(dim, (cut.fused, -1))
        sizes = even_sizes(pieces.shape[dim + 1], axis=axis)
        return own_part(pieces, axis=axis, sizes=sizes, dim=dim + 1).flatten(dim, dim + 1)

    def gather(self, part: torch.Tensor, *, name: str) -> torch.Tensor:
        """The whole tensor on every rank of a stage, out of this rank's part; collective over the axes that cut it."""
        whole = part
        for cut in reversed(self.shards[name].cuts):
            axis = self.state.axis(cut.axis)
            pieces = whole.unflatten(cut.dim, (cut.fused, -1))
            sizes = even_sizes(self.shards[name].shape[cut.dim] // cut.fused, axis=axis)
            whole = all_gather(pieces, axis=axis, sizes=sizes, dim=cut.dim + 1).flatten(cut.dim, cut.dim + 1)
        return whole.contiguous()

    def collect(
        self, part: torch.Tensor | None, *, name: str, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The whole tensor on every rank of every stage; `part` is None on stages that do not hold it. Collective over
        all ranks; dtype and device are those of the parts."""
        shard, whole = self.shards[name], None
        if part is not None:
            whole = self.gather(part, name=name)
        if len(shard.stages) == self.state.pp.size:
            return whole
        if whole is None:
            whole = torch.empty(shard.shape, dtype=dtype, device=device)
        return broadcast(whole, axis=self.state.pp, source=shard.stages[0])

    def take(self, batch: Batch) -> Batch:
        """This rank's part of a data-parallel rank's batch: its tokens under context parallelism, else all."""
        return cut_batch(batch, rank=self.state.cp.coordinate, splitter=self.splitter)

    def text_loss(self, *, vocab_size: int) -> TextLoss:
        """The cross-entropy that fits how the text head is held."""
        if self.state.tp.size == 1:
            return linear_cross_entropy
        return VocabularyParallelLoss(vocab_size=vocab_size, axis=self.state.tp)

    def leave_out(self, model: torch.nn.Module) -> None:
        """Set the parameters of other stages to None; buffers stay, so that every stage knows every balance bias."""
        for name, _ in list(model.named_parameters()):
            if not self.is_here(name):
                path, _, attribute = name.rpartition(".")
                self._absent[name] = Absence(model.get_submodule(path), attribute)
                setattr(self._absent[name].owner, attribute, None)

    def install(self, owner: torch.nn.Module, attribute: str, value: object, /) -> None:
        """Exchange a part of the model for its parallel form; `whole` puts the plain one back for a while."""
        seam = Seam(owner, attribute, getattr(owner, attribute), value)
        self._seams.append(seam)
        setattr(owner, attribute, value)

    @contextlib.contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it `model` is whole and plain on every rank, to be read and run by hand; collective at its start."""
        kept, own = {}, dict(model.named_parameters())
        like = next(iter(own.values()))
        for name, shard in self.shards.items():
            part = own[name].data if name in own else None
            if not shard.cuts and len(shard.stages) == self.state.pp.size:
                continue
            whole = self.collect(part, name=name, dtype=like.dtype, device=like.device)
            if part is None:
                absent = self._absent[name]
                setattr(absent.owner, absent.attribute, torch.nn.Parameter(whole, requires_grad=False))
            else:
                kept[name], own[name].data = part, whole
        for seam in reversed(self._seams):
            setattr(seam.owner, seam.attribute, seam.plain)
        try:
            yield
        finally:
            for seam in self._seams:
                setattr(seam.owner, seam.attribute, seam.parallel)
            for name, part in kept.items():
                own[name].data = part
            for absent in self._absent.values():
                setattr(absent.owner, absent.attribute, None)


class Place(Protocol):
    """What planning needs of a ParallelState, or of a place in grids that do not run."""

    def axis(self, name: str) -> Axis:
        """The axis called `name`."""


def apply_layout(
    model: torch.nn.Module, *, state: ParallelState, parallel: ParallelConfig, is_drawn: bool = True
) -> Layout:
    """Turn `model` into this rank's part, in this order: plan, stage, parts, tensor, context, dispatchers. The model is
    an outline; one that has values already is cut. is_drawn: as in `make_parts`."""
    stages = plan_stages(model.config, pp=parallel.pp, vpp=parallel.vpp, stage_layers=parallel.stage_layers)
    shards = plan_shards(shapes_of(model), place=state, stages=stages)
    layout = Layout(
        state, stages=stages, shards=shards, context_chunk=parallel.context_chunk,
        # of a layer that runs again, `SequenceRegion` knows what rank holds which tokens of the latest micro-batch
        is_one_length=parallel.sequence and parallel.pp > 1,
    )
    layout.leave_out(model)
    make_parts(model, layout=layout, is_drawn=is_drawn)
    install_tensor(model, state=state, install=layout.install, is_sequence=parallel.sequence)
    install_context(
        model, axis=state.cp, install=layout.install, mode=parallel.context, splitter=layout.splitter
    )
    install_dispatchers(model, layout=layout, parallel=parallel)
    return layout


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def plan_shards(
    shapes: Mapping[str, tuple[int, ...]], *, place: Place, stages: StagePlan
) -> dict[str, Shard]:
    """The shard of every parameter of a whole model, by the one placement that matches its name."""
    shards = {}
    for name, shape in shapes.items():
        (placement,) = placements_of(name)
        holders = stages.holders(name, placement=placement)
        shards[name] = plan_shard(name, placement=placement, shape=shape, state=place, stages=holders)
    return shards


def make_parts(model: torch.nn.Module, *, layout: Layout, is_drawn: bool = True) -> None:
    """Give every parameter of this rank its part, one by one: of an outline its initial values, else a cut of what it
    has. is_drawn: False gives an outline stand-ins, of the shape of a part and in the memory of one element."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            if layout.shards[name].cuts:
                parameter.data = layout.cut(parameter.data, name=name).clone()
        elif is_drawn:
            model.hold(name, values=draw_part(model, name=name, layout=layout, dtype=parameter.dtype))
        else:
            one = torch.zeros((), dtype=parameter.dtype, device="cpu")
            model.hold(name, values=one.expand(_part_shape(layout.shards[name].shape, kept=layout.kept_indices(name))))


def draw_part(model: torch.nn.Module, *, name: str, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """This rank's part of a parameter's initial values, on the CPU."""
    shape, kept = layout.shards[name].shape, layout.kept_indices(name)
    part = torch.empty(_part_shape(shape, kept=kept), dtype=dtype, device="cpu")
    model.initial.fill(part, name=name, shape=shape, kept=kept)
    return part


def _part_shape(shape: tuple[int, ...], *, kept: KeptIndices) -> tuple[int, ...]:
    return tuple(size if own is None else own.numel() for size, own in zip(shape, kept, strict=True))


def install_dispatchers(model: torch.nn.Module, *, layout: Layout, parallel: ParallelConfig) -> None:
    """Give every mixture-of-experts layer a dispatcher that reaches the experts of other ranks. With tp each rank
    brings a share of the tokens that the ranks have in common, so that no expert sees a token twice.
    """
    state = layout.state
    if state.ep.size * state.etp.size * state.tp.size == 1:
        return
    made = make_dispatcher(
        parallel.dispatcher, state=state, is_replicated=not parallel.sequence, overlaps=parallel.overlap != "none"
    )
    for layer in model.moe_layers():
        layout.install(layer, "dispatcher", made)
        if parallel.overlap == "halves":
            layout.install(layer, "run_routed", Halves(layer, dispatcher=made))


def plan_shard(
    name: str, *, placement: Placement, shape: tuple[int, ...], state: Place, stages: tuple[int, ...]
) -> Shard:
    """The shard of one parameter of `shape` that `stages` hold; of `state`, only sizes of axes matter."""
    is_expert = placement.ep_dim is not None
    wanted = [Cut(placement.ep_dim, "ep", 1)] if is_expert else []
    if placement.tp_dim is not None:
        wanted.append(Cut(placement.tp_dim, "etp" if is_expert else placement.tp_axis, placement.fused))
    cuts = tuple(cut for cut in wanted if state.axis(cut.axis).size > 1)
    if is_expert:
        # experts that no axis cuts are copies like any whole parameter, and ZeRO partitions them like one
        copies = ("edp",) if cuts else ("dp_cp", "tp")
        return Shard(name, shape, cuts, sum_axes=("edp",), copy_axes=copies, stages=stages)
    inner = {(): ("tp",), ("keys",): ("key_copies",), ("tp",): ()}[tuple(cut.axis for cut in cuts)]
    return Shard(name, shape, cuts, sum_axes=("dp_cp",), copy_axes=("dp_cp", *inner), stages=stages)
