"""Running the sections of one pipeline stage: hidden states travel to the next section, their gradients back.

Every stage reads the same data, so shapes are derived, never sent. Each kind of message has a process group of its
own: within one, the order of sends is the order of the receiver's receives, and nothing waits behind another kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ernie5.model.shard_plan import Section
from ernie5.parallel.dims import GridDims
from ernie5.parallel.schedule import Action, evaluation_schedule, training_schedule
from ernie5.parallel.stages import StagePlan
from ernie5.parallel.state import Axis, ParallelState
from ernie5.records import Batch


@dataclasses.dataclass(frozen=True)
class Passed:
    """What a section made of a micro-batch: hidden [B, T, D] for the next one, and its share of the objective (0-d)."""

    hidden: torch.Tensor
    share: torch.Tensor


class RunSection(Protocol):
    """The forward pass of one section."""

    def __call__(self, batch: Batch, *, section: Section, hidden: torch.Tensor | None) -> Passed:
        """hidden [B, T, D] from the section before, None for the first."""


@dataclasses.dataclass(frozen=True)
class Flight:
    """A micro-batch between its forward and its backward pass in one section. roots: where the backward pass starts
    beside the gradient of what was sent; sent: the edge that takes that gradient, so that the tensor itself can go."""

    entered: torch.Tensor | None
    roots: tuple[torch.Tensor, ...]
    sent: GradientEdge | None


class Link:
    """Messages of one kind between neighbours on the pp axis, received in the order in which they were sent."""

    def __init__(self, axis: Axis, *, group: dist.ProcessGroup | None) -> None:
        self._axis, self._group = axis, group
        self._under_way: list[tuple[dist.Work, torch.Tensor]] = []

    def send(self, x: torch.Tensor, *, to: int) -> None:
        """Hand x to the stage `to`, and keep it until it is gone."""
        self._under_way = [(work, kept) for work, kept in self._under_way if not work.is_completed()]
        x = x.detach().contiguous()
        self._under_way.append((dist.isend(x, self._axis.ranks[to], group=self._group), x))
        self._axis.traffic.add("stages", num_bytes=x.numel() * x.element_size())

    def receive(self, x: torch.Tensor, *, source: int) -> dist.Work:
        """Start to fill x with the next message of the stage `source`."""
        return dist.irecv(x, self._axis.ranks[source], group=self._group)

    def settle(self) -> None:
        """Wait until everything sent is gone."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()


class Pipeline:
    """One stage's runner. width, dtype, device: of the hidden states. Building it is collective."""

    def __init__(
        self, state: ParallelState, *, stages: StagePlan, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._axis, self._plan = state.pp, stages
        self._width, self._dtype, self._device = width, dtype, device
        self._links = build_links(state.pp, dims=state.dims, is_interleaved=stages.vpp > 1)

    def train(self, batches: Sequence[Batch], *, run: RunSection, after_backward: Callable[[], None]) -> None:
        """Forward and backward of every micro-batch through this stage's sections, in the order of the schedule."""
        schedule = training_schedule(
            stages=self._plan.pp, sections_per_stage=self._plan.vpp, micro_batches=len(batches)
        )
        flights: dict[tuple[int, int], Flight] = {}
        for action, received in self._received(schedule[self._axis.coordinate], batches=batches):
            key = (action.section, action.micro)
            if action.is_forward:
                entered = received if received is None else received.requires_grad_()
                flights[key] = self._forward(action, batch=batches[action.micro], entered=entered, run=run)
            else:
                self._backward(action, flight=flights.pop(key), gradient=received)
                after_backward()
        self._settle()

    def evaluate(self, batches: Sequence[Batch], *, run: RunSection) -> None:
        """Forward alone; call it without gradients."""
        schedule = evaluation_schedule(
            stages=self._plan.pp, sections_per_stage=self._plan.vpp, micro_batches=len(batches)
        )
        for action, received in self._received(schedule[self._axis.coordinate], batches=batches):
            self._forward(action, batch=batches[action.micro], entered=received, run=run)
        self._settle()

    def _forward(self, action: Action, *, batch: Batch, entered: torch.Tensor | None, run: RunSection) -> Flight:
        passed = run(batch, section=self._plan.sections[action.section], hidden=entered)
        roots = (passed.share,) if passed.share.requires_grad else ()
        if action.section + 1 == len(self._plan.sections):
            return Flight(entered, roots, None)
        if passed.hidden.shape != self._shape(batch) or passed.hidden.dtype != self._dtype:
            raise RuntimeError(
                f"section {action.section} gave {tuple(passed.hidden.shape)} of {passed.hidden.dtype}, and the next "
                f"stage waits for {tuple(self._shape(batch))} of {self._dtype}"
            )
        self._link(action.section, is_forward=True).send(passed.hidden, to=(action.section + 1) % self._plan.pp)
        return Flight(entered, roots, get_gradient_edge(passed.hidden) if passed.hidden.requires_grad else None)

    def _backward(self, action: Action, *, flight: Flight, gradient: torch.Tensor | None) -> None:
        roots: list[torch.Tensor | GradientEdge] = list(flight.roots)
        gradients: list[torch.Tensor | None] = [None] * len(roots)
        if flight.sent is not None:
            roots.append(flight.sent)
            gradients.append(gradient)
        torch.autograd.backward(roots, gradients)
        if flight.entered is not None:
            before = action.section - 1
            self._link(before, is_forward=False).send(flight.entered.grad, to=before % self._plan.pp)

    def _received(
        self, actions: Sequence[Action], *, batches: Sequence[Batch]
    ) -> Iterator[tuple[Action, torch.Tensor | None]]:
        """Each action with what it needs from its neighbour; the next one's message is on its way meanwhile."""
        posted = self._post(actions[0], batches=batches)
        for action, following in zip(actions, (*actions[1:], None), strict=True):
            received = None
            if posted is not None:
                work, received = posted
                work.wait()
            posted = None if following is None else self._post(following, batches=batches)
            yield action, received

    def _post(self, action: Action, *, batches: Sequence[Batch]) -> tuple[dist.Work, torch.Tensor] | None:
        """Start to receive the hidden states that enter a section, or the gradient of those that left it."""
        source = action.section - 1 if action.is_forward else action.section + 1
        if not 0 <= source < len(self._plan.sections):
            return None
        x = torch.empty(self._shape(batches[action.micro]), dtype=self._dtype, device=self._device)
        link = self._link(min(source, action.section), is_forward=action.is_forward)
        return link.receive(x, source=source % self._plan.pp), x

    def _shape(self, batch: Batch) -> torch.Size:
        return torch.Size((*batch.token_ids.shape, self._width))

    def _link(self, lower: int, *, is_forward: bool) -> Link:
        """The link between the sections `lower` and lower + 1."""
        wraps = lower % self._plan.pp == self._plan.pp - 1
        return self._links[is_forward, wraps]

    def _settle(self) -> None:
        for link in self._links.values():
            link.settle()


def build_links(axis: Axis, *, dims: GridDims, is_interleaved: bool) -> dict[tuple[bool, bool], Link]:
    """Links by (is forward, leads from the last stage back to the first); collective over all ranks."""
    links = {}
    for is_forward in (True, False):
        for wraps in (False, True) if is_interleaved else (False,):
            group = None
            for ranks in dims.groups("pp") if axis.size > 1 else ():
                made = dist.new_group(list(ranks))
                group = made if ranks == axis.ranks else group
            links[is_forward, wraps] = Link(axis, group=group)
    return links
