"""The yardstick: one process, plain PyTorch, nothing clever. Every other engine is tested as equal to this one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch

from ernie5.engine.interface import Engine, StateSlice, StepReport, StepSettings, StepSums
from ernie5.engine.micro_step import MicroStep, SumsBuilder, global_counts
from ernie5.engine.slices import buffer_slices, optimizer_slices
from ernie5.model.moe.balance import orthogonality_step
from ernie5.optim.adamw import AdamW, materialise_state
from ernie5.optim.build import build_optimizer
from ernie5.optim.clip import clip_factor, global_norm
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import build_groups
from ernie5.parallel.boxes import Held
from ernie5.records import Batch


class LocalEngine(Engine):
    """fp32, or bf16 parameters under fp32 masters (or none) with fp32 accumulation of gradients."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        optim: OptimConfig,
        settings: StepSettings,
        precision: str,
        device: torch.device,
    ) -> None:
        self.model, self.device, self.rank, self.world_size = model, device, 0, 1
        self.dp_rank, self.dp_size = 0, 1
        self.settings = settings
        self.magnitudes = settings.magnitudes.to(device)
        model.to(device)
        optim.check_engine(kind="local", precision=precision)
        self._masters = make_masters(model, precision=precision, rounds_at_random=optim.stochastic_rounding)
        groups = build_groups(model, weight_decay=optim.weight_decay, split_matrices=optim.name == "muon")
        groups = [
            dataclasses.replace(group, parameters=tuple(self._masters[name] for name in group.names))
            for group in groups
        ]
        self._optimizer = build_optimizer(groups, config=optim, copies=copies_of(self._masters, model=model))
        if isinstance(self._optimizer, AdamW):
            materialise_state(self._optimizer)
        self._takes_bf16 = optim.name == "adamw"
        self._step = MicroStep(model, config=settings.objectives)
        self.updates = 0

    def accumulate(self, micro_batches: Sequence[Batch]) -> StepSums:
        """Forward and backward over `micro_batches`, gradients summed in fp32."""
        self.model.train()
        batches = [batch.to(self.device) for batch in micro_batches]
        counts = global_counts(batches, reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        self._choose_gradients(len(batches))
        for batch in batches:
            share, terms, routing = self._step(batch, counts, self.magnitudes)
            share.backward()
            move_gradients(self.model, masters=self._masters)
            builder.add(share, terms=terms, routing=routing, tokens=batch.counts().tokens)
        return builder.finish(reduce=self.sum_over_ranks)

    def update(self, sums: StepSums, *, learning_rate: float) -> StepReport:
        """Clip, step masters and the model, move balance bias and magnitudes."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        norm = global_norm(gradients)
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step(gradient_scale=clip_factor(norm, max_norm=self.settings.clip_norm))
            self.updates += 1
            self._orthogonalise(learning_rate)
            self.follow(sums)
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(sums=sums, grad_norm=norm, skipped=skipped)

    def poison(self) -> None:
        """NaN into every gradient."""
        poison_gradients(self._masters)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Copies of the accumulated gradients, fp32 at least."""
        return {
            name: master.grad.to(torch.promote_types(master.grad.dtype, torch.float32), copy=True)
            for name, master in self._masters.items()
            if master.grad is not None
        }

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch) -> StepSums:
        """Forward without gradients."""
        self.model.eval()
        batch = batch.to(self.device)
        counts = global_counts([batch], reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        share, terms, routing = self._step(batch, counts, self.magnitudes)
        builder.add(share, terms=terms, routing=routing, tokens=batch.counts().tokens)
        return builder.finish(reduce=self.sum_over_ranks)

    def slices(self) -> Iterator[StateSlice]:
        """Every tensor whole."""
        for name, master in self._masters.items():
            held = Held(tuple(master.shape))
            yield from optimizer_slices(self._optimizer, master=master, name=name, held=held, is_written=True)
        yield from buffer_slices(self.model, is_written=True)

    def adopt(self, *, updates: int, magnitudes: torch.Tensor) -> None:
        """Copy masters to the model and set the counters."""
        adopt_masters(self._masters, optimizer=self._optimizer, model=self.model, updates=updates)
        self.updates, self.magnitudes = updates, magnitudes.to(self.device)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """One rank: the values themselves."""
        return values

    def gather(self, value: dict) -> list[dict]:
        """One rank: its own value."""
        return [value]

    def close(self) -> None:
        """Nothing to release."""

    def _choose_gradients(self, micro_batches: int) -> None:
        """A step of one micro-batch never makes an fp32 copy of a bf16 gradient; those of several add up in fp32."""
        for master in self._masters.values():
            if self._takes_bf16 and master.grad is None:
                wide = torch.promote_types(master.dtype, torch.float32)
                master.grad_dtype = None if micro_batches == 1 else wide

    def _orthogonalise(self, learning_rate: float) -> None:
        """The decoupled router step of ERNIE 4.5 (fp32 only: the model's weights are then the masters)."""
        speed = learning_rate * self.settings.objectives.orthogonality_weight
        if not speed:
            return
        for router in self.model.routers():
            orthogonality_step(router, speed=speed)


def move_gradients(model: torch.nn.Module, *, masters: dict[str, torch.nn.Parameter]) -> None:
    """Add the gradients of bf16 parameters to those of their fp32 masters, and clear them.

    A master that takes any dtype keeps the first one as it is; sums are fp32.
    """
    for name, parameter in model.named_parameters():
        master = masters.get(name)
        if master is None or master is parameter or parameter.grad is None:
            continue
        if master.grad is None:
            master.grad = parameter.grad if master.grad_dtype is None else parameter.grad.float()
        else:
            master.grad = master.grad.float().add_(parameter.grad)
        parameter.grad = None


def copies_of(
    masters: dict[str, torch.nn.Parameter], *, model: torch.nn.Module
) -> dict[torch.nn.Parameter, torch.nn.Parameter]:
    """The bf16 weight under each master that has one."""
    weights = dict(model.named_parameters())
    return {master: weights[name] for name, master in masters.items() if master is not weights[name]}


@torch.no_grad()
def copy_masters(masters: dict[str, torch.nn.Parameter], *, model: torch.nn.Module) -> None:
    """Write the fp32 masters into bf16 parameters."""
    for name, parameter in model.named_parameters():
        master = masters.get(name)
        if master is not None and master is not parameter:
            parameter.copy_(master)


def poison_gradients(masters: dict[str, torch.nn.Parameter]) -> None:
    """NaN into the gradient of every master."""
    for master in masters.values():
        if master.grad is not None:
            master.grad.fill_(math.nan)


def adopt_masters(
    masters: dict[str, torch.nn.Parameter], *, optimizer: torch.optim.Optimizer, model: torch.nn.Module, updates: int
) -> None:
    """After new values were written into masters and moments: copy to bf16 parameters, set the optimizer's counters."""
    for master in masters.values():
        if "step" in optimizer.state[master]:
            optimizer.state[master]["step"].fill_(updates)
    copy_masters(masters, model=model)


def cast_parameters(model: torch.nn.Module, *, precision: str) -> None:
    """Make floating parameters bf16 if asked; buffers (balance bias) stay fp32, whose small steps bf16 would lose."""
    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)


def make_masters(
    model: torch.nn.Module, *, precision: str, rounds_at_random: bool = False
) -> dict[str, torch.nn.Parameter]:
    """The weights by name that the optimizer steps: fp32 copies under bf16 parameters, else the parameters themselves,
    fp32, or bf16 where steps round at random."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if precision == "fp32":
        return trainable
    if rounds_at_random:
        cast_parameters(model, precision=precision)
        return trainable
    masters = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in trainable.items()}
    cast_parameters(model, precision=precision)
    return masters
