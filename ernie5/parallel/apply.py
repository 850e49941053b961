"""From a whole, seeded model to one rank's part of it, in one visible order.

Every rank builds the same whole model from the seed and keeps its slices, so that all layouts start from identical
weights. What is cut where stands in `model/shard_plan.py`; names stay global, shapes become local.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from ernie5.model.shard_plan import Placement, placements_of
from ernie5.objectives.next_token import TextLoss
from ernie5.parallel.collectives import all_gather, even_sizes, own_part
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.context import cut_batch, install_context
from ernie5.parallel.expert import make_dispatcher
from ernie5.parallel.state import Axis, ParallelState
from ernie5.parallel.tensor import VocabularyParallelLoss, install_tensor
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
    copy_axes: the axes whose ranks hold equal copies, of which the rank at coordinate 0 counts in norms.
    """

    name: str
    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]
    sum_axes: tuple[str, ...]
    copy_axes: tuple[str, ...]


@dataclasses.dataclass
class Seam:
    """One exchanged part of the model: `owner.attribute` is `parallel` in the cut model and `plain` in a whole one."""

    owner: torch.nn.Module
    attribute: str
    plain: object
    parallel: object


class Layout:
    """How a model is spread: the shard of every parameter by name, and the seams that were exchanged."""

    def __init__(self, state: ParallelState, *, shards: dict[str, Shard]) -> None:
        self.state, self.shards = state, shards
        self._seams: list[Seam] = []

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the parameters that are spread over the expert grid."""
        return tuple(name for name, shard in self.shards.items() if "edp" in shard.copy_axes)

    def is_counted_here(self, name: str) -> bool:
        """Whether this rank is the one of all equal copies that counts in a norm."""
        return all(self.state.axis(axis).coordinate == 0 for axis in self.shards[name].copy_axes)

    def sum_axes(self, name: str) -> tuple[Axis, ...]:
        """The axes over which gradients of `name` are summed."""
        return tuple(self.state.axis(axis) for axis in self.shards[name].sum_axes)

    def cut(self, whole: torch.Tensor, *, name: str) -> torch.Tensor:
        """This rank's contiguous part of a whole tensor."""
        part = whole
        for cut in self.shards[name].cuts:
            axis = self.state.axis(cut.axis)
            pieces = part.unflatten(cut.dim, (cut.fused, -1))
            sizes = even_sizes(pieces.shape[cut.dim + 1], axis=axis)
            part = own_part(pieces, axis=axis, sizes=sizes, dim=cut.dim + 1).flatten(cut.dim, cut.dim + 1)
        return part.contiguous()

    def gather(self, part: torch.Tensor, *, name: str) -> torch.Tensor:
        """The whole tensor on every rank, out of this rank's part; collective over the axes that cut it."""
        whole = part
        for cut in reversed(self.shards[name].cuts):
            axis = self.state.axis(cut.axis)
            pieces = whole.unflatten(cut.dim, (cut.fused, -1))
            sizes = even_sizes(self.shards[name].shape[cut.dim] // cut.fused, axis=axis)
            whole = all_gather(pieces, axis=axis, sizes=sizes, dim=cut.dim + 1).flatten(cut.dim, cut.dim + 1)
        return whole.contiguous()

    def take(self, batch: Batch) -> Batch:
        """This rank's part of a data-parallel rank's batch: its tokens under context parallelism, else all."""
        return cut_batch(batch, rank=self.state.cp.coordinate, ranks=self.state.cp.size)

    def text_loss(self, *, vocab_size: int) -> TextLoss:
        """The cross-entropy that fits how the text head is held."""
        if self.state.tp.size == 1:
            return linear_cross_entropy
        return VocabularyParallelLoss(vocab_size=vocab_size, axis=self.state.tp)

    def install(self, owner: torch.nn.Module, attribute: str, value: object, /) -> None:
        """Exchange a part of the model for its parallel form; `whole` puts the plain one back for a while."""
        seam = Seam(owner, attribute, getattr(owner, attribute), value)
        self._seams.append(seam)
        setattr(owner, attribute, value)

    @contextlib.contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it `model` is whole and plain on every rank, to be read and run by hand; collective at its start."""
        kept = {}
        for name, parameter in model.named_parameters():
            if self.shards[name].cuts:
                kept[name] = parameter.data
                parameter.data = self.gather(parameter.data, name=name)
        for seam in reversed(self._seams):
            setattr(seam.owner, seam.attribute, seam.plain)
        try:
            yield
        finally:
            for seam in self._seams:
                setattr(seam.owner, seam.attribute, seam.parallel)
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.data = kept[name]


def apply_layout(model: torch.nn.Module, *, state: ParallelState, parallel: ParallelConfig) -> Layout:
    """Turn the whole `model` into this rank's part, in this order: plan, cut, tensor, context, dispatchers."""
    layout = Layout(state, shards=plan_shards(model, state=state))
    cut_parameters(model, layout=layout)
    install_tensor(model, axis=state.tp, install=layout.install, is_sequence=parallel.sequence)
    install_context(model, axis=state.cp, install=layout.install, mode=parallel.context)
    install_dispatchers(model, layout=layout, parallel=parallel)
    return layout


def plan_shards(model: torch.nn.Module, *, state: ParallelState) -> dict[str, Shard]:
    """The shard of every parameter of the whole `model`, by the one placement that matches its name."""
    shards = {}
    for name, parameter in model.named_parameters():
        (placement,) = placements_of(name)
        shards[name] = _plan_shard(name, placement, shape=tuple(parameter.shape), state=state)
    return shards


def cut_parameters(model: torch.nn.Module, *, layout: Layout) -> None:
    """Replace the values of every cut parameter by this rank's part; the Parameter objects stay."""
    for name, parameter in model.named_parameters():
        if layout.shards[name].cuts:
            parameter.data = layout.cut(parameter.data, name=name).clone()


def install_dispatchers(model: torch.nn.Module, *, layout: Layout, parallel: ParallelConfig) -> None:
    """Give every mixture-of-experts layer a dispatcher that reaches the experts of other ranks. With tp each rank
    brings a share of the tokens that the ranks have in common, so that no expert sees a token twice.
    """
    state = layout.state
    if state.ep.size * state.etp.size * state.tp.size == 1:
        return
    for layer in model.moe_layers():
        made = make_dispatcher(
            parallel.dispatcher, state=state, is_replicated=not parallel.sequence,
            overlaps=parallel.overlap == "shared",
        )
        layout.install(layer, "dispatcher", made)


def _plan_shard(name: str, placement: Placement, *, shape: tuple[int, ...], state: ParallelState) -> Shard:
    is_expert = placement.ep_dim is not None
    wanted = [Cut(placement.ep_dim, "ep", 1)] if is_expert else []
    if placement.tp_dim is not None:
        wanted.append(Cut(placement.tp_dim, "etp" if is_expert else "tp", placement.fused))
    cuts = tuple(cut for cut in wanted if state.axis(cut.axis).size > 1)
    if is_expert:
        return Shard(name, shape, cuts, sum_axes=("edp",), copy_axes=("edp",))
    copies = ("dp_cp",) if cuts else ("dp_cp", "tp")
    return Shard(name, shape, cuts, sum_axes=("dp_cp",), copy_axes=copies)
