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

import torch
import torch.distributed as dist

from ernie5.errors import CheckpointError
from ernie5.model.moe.balance import update_balance
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import mean_losses, update_magnitudes
from ernie5.records import Batch, LossTerms, RoutingStats, TargetCounts, TensorRecord

LISTED_PROBLEMS = 6


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


@dataclasses.dataclass
class EngineState:
    """Everything an engine needs to continue, layout-free, on the CPU.

    parameters: fp32 master weights by global name; buffers: persistent buffers (balance bias); moments: optimizer
    state as `<kind>/<parameter name>`, fp32; updates: optimizer steps applied; magnitudes [4] fp64.
    """

    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    updates: int
    magnitudes: torch.Tensor


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the update needs beside the optimizer: losses, clipping, bias speed and the even-guess magnitudes."""

    objectives: ObjectivesConfig
    clip_norm: float
    balance_speed: float
    magnitudes: torch.Tensor


class Engine(abc.ABC):
    """Interface of `local.py`, `grid.py` and `deepspeed_engine.py`, which are tested to be equal.

    dp_rank of dp_size: which streams of data this rank reads; ranks of one tp, cp or pp group read the same.
    """

    model: torch.nn.Module
    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    settings: StepSettings
    magnitudes: torch.Tensor

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
    def state(self) -> EngineState:
        """Collect the state; collective, and only rank 0's return value is complete."""

    @abc.abstractmethod
    def load_state(self, state: EngineState) -> None:
        """Continue from `state`, which every rank passes. Raises CheckpointError naming every mismatch."""

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


def check_names(found: dict[str, torch.Tensor], *, expected: dict[str, torch.Tensor], what: str) -> None:
    """Compare names and shapes; raises CheckpointError that lists the first differences and counts the others."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown to the model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name].shape)}, the model wants {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        more = len(problems) - LISTED_PROBLEMS
        listed = "; ".join(problems[:LISTED_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(
            f"{len(problems)} {what} of the checkpoint do not fit the model: {listed}. A checkpoint loads "
            "only into the architecture it was written by; compare `ernie5 inspect CKPT` with the configuration"
        )
