"""What an engine is: it turns the micro-batches of one optimizer step into one update of the model.

An engine owns the model, the optimizer and the running magnitudes of the losses. The rest of the system sees sums of
nats, counts and loads that are already global, and full fp32 tensors by parameter name; how they are spread over ranks
is the engine's secret.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from ernie5.errors import CheckpointError
from ernie5.model.moe.balance import update_balance
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import mean_losses, update_magnitudes
from ernie5.parallel.boxes import Box, whole_box
from ernie5.records import Batch, LossTerms, RoutingStats, TargetCounts, TensorRecord

LISTED_PROBLEMS = 6
PARAMETER, BUFFER, MOMENT = KINDS = ("parameters", "buffers", "optimizer tensors")


@dataclasses.dataclass(frozen=True)
class StepSums(TensorRecord):
    """What one step or one evaluation batch added up to, over its micro-batches and all ranks, detached.

    terms: sums of nats, 0-d fp64; counts: their divisors; routing: loads summed, routing losses averaged by tokens;
    objective: the optimised value, 0-d fp64.
    """

    terms: LossTerms
    counts: TargetCounts
    routing: RoutingStats
    objective: torch.Tensor


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One optimizer step: its sums, the gradient norm before clipping (0-d fp32), and whether it was skipped because
    the norm was not finite (parameters, moments, balance bias and magnitudes are then as before)."""

    sums: StepSums
    grad_norm: torch.Tensor
    skipped: bool


@dataclasses.dataclass(frozen=True)
class StateSlice:
    """A box of one named tensor of an engine's state, as this rank holds it.

    kind: PARAMETER (fp32 masters, or the weights of a run without), MOMENT (`<kind>/<parameter name>`, fp32, or uint8
    codes and their fp32 scales, which have a shape of their own) or BUFFER; key: global name; shape: of the
    whole tensor; values: a view of the live memory, in the box's shape; is_written: whether this rank is the one of all
    that hold these values which saves them.
    """

    kind: str
    key: str
    shape: tuple[int, ...]
    box: Box
    values: torch.Tensor
    is_written: bool


class StateSource(Protocol):
    """A state to continue from, of which an engine reads the boxes it holds: a checkpoint, or tensors in memory."""

    updates: int
    magnitudes: torch.Tensor

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of a kind, by key."""

    def read(self, key: str, *, box: Box, into: torch.Tensor) -> None:
        """Write the values of `box` into the view `into`, which has the box's shape."""


@dataclasses.dataclass
class EngineState:
    """Everything an engine needs to continue, whole and on the CPU: for small models and comparisons.

    parameters: fp32 master weights by global name; buffers: persistent buffers (balance bias); moments: optimizer
    state as `<kind>/<parameter name>`, fp32; updates: optimizer steps applied; magnitudes [4] fp64.
    """

    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    updates: int
    magnitudes: torch.Tensor

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        """The tensors of a kind."""
        return {PARAMETER: self.parameters, BUFFER: self.buffers, MOMENT: self.moments}[kind]

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """As StateSource."""
        return {key: tuple(value.shape) for key, value in self.tensors(kind).items()}

    def read(self, key: str, *, box: Box, into: torch.Tensor) -> None:
        """As StateSource."""
        whole = next(self.tensors(kind)[key] for kind in KINDS if key in self.tensors(kind))
        into.copy_(cut_box(whole, box=box))

    def slices(self) -> list[StateSlice]:
        """Every tensor as one slice."""
        return [
            StateSlice(kind, key, tuple(value.shape), whole_box(tuple(value.shape)), value, is_written=True)
            for kind in KINDS
            for key, value in self.tensors(kind).items()
        ]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the update needs beside the optimizer: losses, clipping, bias speed and the even-guess magnitudes."""

    objectives: ObjectivesConfig
    clip_norm: float
    balance_speed: float
    magnitudes: torch.Tensor


class Engine(abc.ABC):
    """Interface of `local.py`, `grid.py` and `deepspeed_engine.py`, which are tested to be equal.

    updates: optimizer steps applied. dp_rank of dp_size: which streams of data this rank reads; ranks of one tp, cp or
    pp group read the same.
    """

    model: torch.nn.Module
    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    settings: StepSettings
    magnitudes: torch.Tensor
    updates: int

    def train_step(self, micro_batches: Sequence[Batch], *, learning_rate: float) -> StepReport:
        """Run one optimizer step on this rank's micro-batches (the same number on every rank)."""
        sums = self.accumulate(micro_batches)
        return self.update(sums, learning_rate=learning_rate)

    @abc.abstractmethod
    def accumulate(self, micro_batches: Sequence[Batch]) -> StepSums:
        """Forward and backward over `micro_batches`; gradients of the global objective are then in place."""

    @abc.abstractmethod
    def update(self, sums: StepSums, *, learning_rate: float) -> StepReport:
        """Clip, step, move balance bias and magnitudes, clear gradients."""

    def follow(self, sums: StepSums) -> None:
        """Move what follows an optimizer step that was not skipped: the balance bias and the running magnitudes."""
        settings = self.settings
        update_balance(self.model.routers(), loads=sums.routing.loads, speed=settings.balance_speed)
        floor = settings.objectives.magnitude_floor * settings.magnitudes.to(self.magnitudes.device)
        self.magnitudes = update_magnitudes(
            self.magnitudes,
            means=mean_losses(sums.terms, counts=sums.counts),
            decay=settings.objectives.ema_decay,
            floor=floor,
        )

    def discard(self, sums: StepSums) -> StepReport:
        """Drop the gradients in place, as if they were not finite: nothing of the state moves, on any rank."""
        self.poison()
        report = self.update(sums, learning_rate=0.0)
        if not report.skipped:
            raise RuntimeError("gradients that were to be dropped have moved the parameters")
        return report

    @abc.abstractmethod
    def poison(self) -> None:
        """Make the gradients in place NaN, so that `update` skips the step."""

    @abc.abstractmethod
    def gradients(self) -> dict[str, torch.Tensor]:
        """Full fp32 gradients by parameter name, between `accumulate` and `update`, before clipping."""

    @abc.abstractmethod
    def evaluate_batch(self, batch: Batch) -> StepSums:
        """Forward without gradients; sums over all ranks (every rank passes its own batch)."""

    @abc.abstractmethod
    def slices(self) -> Iterator[StateSlice]:
        """What this rank holds of the state, as views of the memory that steps use; no collective, no copy."""

    @abc.abstractmethod
    def adopt(self, *, updates: int, magnitudes: torch.Tensor) -> None:
        """Go on from the values that now stand in `slices()` after `updates` optimizer steps; collective."""

    @torch.no_grad()
    def load_state(self, source: StateSource) -> None:
        """Continue from `source`, each rank reading the boxes that it holds; collective.

        Raises CheckpointError naming every mismatch, on every rank.
        """
        own = list(self.slices())
        self._check_fit(source, own=own, kinds=KINDS)
        for piece in own:
            source.read(piece.key, box=piece.box, into=piece.values)
        self.adopt(updates=source.updates, magnitudes=source.magnitudes)

    @torch.no_grad()
    def load_weights(self, source: StateSource) -> None:
        """Start from the parameters and buffers of `source` alone, with a new optimizer; collective. Raises as
        `load_state`."""
        own = [piece for piece in self.slices() if piece.kind != MOMENT]
        self._check_fit(source, own=own, kinds=(PARAMETER, BUFFER))
        for piece in own:
            source.read(piece.key, box=piece.box, into=piece.values)
        self.adopt(updates=0, magnitudes=self.magnitudes)

    def state(self) -> EngineState:
        """The whole state in memory on every rank, out of everybody's slices; collective. Checkpoints never need it."""
        own = [(p.kind, p.key, p.shape, p.box, p.values.cpu().clone()) for p in self.slices() if p.is_written]
        everyone: list = [own]
        if self.world_size > 1:
            everyone = [None] * self.world_size
            dist.all_gather_object(everyone, own)
        state = EngineState({}, {}, {}, self.updates, self.magnitudes.cpu().clone())
        for kind, key, shape, box, values in (piece for one in everyone for piece in one):
            unset = torch.nan if values.dtype.is_floating_point else 0
            whole = state.tensors(kind).setdefault(key, torch.full(shape, unset, dtype=values.dtype))
            cut_box(whole, box=box).copy_(values)
        return state

    def _check_fit(self, source: StateSource, *, own: list[StateSlice], kinds: Sequence[str]) -> None:
        """Names and shapes of all ranks together must be those of `source`: a stage knows its own layers alone."""
        needed = {kind: {p.key: p.shape for p in own if p.kind == kind} for kind in kinds}
        if self.total(float(any(needed[kind] != source.shapes(kind) for kind in kinds))):
            for other in self.gather(needed):
                for kind in kinds:
                    needed[kind] |= {key: tuple(shape) for key, shape in other[kind].items()}
        for kind in kinds:
            check_names(source.shapes(kind), expected=needed[kind], what=kind)

    def save_native(self, folder: Path, *, name: str) -> None:
        """Write the files of the library behind the engine as `folder`/`name`; collective. Only DeepSpeed has some; a
        configuration that asks another engine for them is refused before it is built."""
        raise NotImplementedError(f"{type(self).__name__} has no format of its own")

    @abc.abstractmethod
    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of `values` over the ranks that see other data (dp x cp): what figures and counts are made of."""

    def total(self, number: float) -> float:
        """Sum of `number` over all ranks, those of one tp group too: how ranks agree on what to do; collective."""
        if self.world_size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    @abc.abstractmethod
    def gather(self, value: dict) -> list[dict]:
        """The JSON-able `value` of every rank, in order of ranks, on every rank."""

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[None]:
        """Within it, every parameter of `model` is whole on every rank, to be read and run by hand; collective."""
        yield

    @abc.abstractmethod
    def close(self) -> None:
        """Release process groups."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


def cut_box(tensor: torch.Tensor, *, box: Box) -> torch.Tensor:
    """The view of `box` in a whole tensor."""
    for dim, (start, size) in enumerate(zip(box.start, box.shape, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def check_names(
    found: dict[str, tuple[int, ...]], *, expected: dict[str, tuple[int, ...]], what: str
) -> None:
    """Compare names and shapes; raises CheckpointError that lists the first differences and counts the others."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown to the model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, the model wants {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        more = len(problems) - LISTED_PROBLEMS
        listed = "; ".join(problems[:LISTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        way = "A checkpoint loads only into the architecture it was written by; compare `ernie5 inspect CKPT` with the "
        way += "configuration"
        if what == MOMENT:
            way = "They belong to the optimizer that the run had (optim.name, optim.moments): set the same, or start "
            way += "from the weights alone with train.init_from=CKPT"
        raise CheckpointError(f"{len(problems)} {what} of the checkpoint do not fit the model: {listed}. {way}")
