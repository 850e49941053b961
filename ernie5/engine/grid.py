"""Plain PyTorch on any layout of the grids: the local engine, with the sums over ranks that a layout needs.

Every rank's share of the objective is already divided by global counts, so gradients are summed, never averaged: those
of experts over their replicas (edp), all others over dp x cp. Nothing is scaled by a degree.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ernie5.engine.clipping import clip_over_ranks
from ernie5.engine.config import EngineConfig
from ernie5.engine.interface import Engine, EngineState, StepReport, StepSettings, StepSums, check_names
from ernie5.engine.local import (
    copy_masters,
    load_buffers,
    make_masters,
    move_gradients,
    persistent_buffers,
    poison_gradients,
)
from ernie5.engine.micro_step import MicroStep, SumsBuilder, global_counts
from ernie5.engine.peers import find_peers
from ernie5.optim.adamw import materialise_state
from ernie5.optim.build import build_optimizer
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import build_groups
from ernie5.parallel.apply import apply_layout
from ernie5.parallel.buckets import sum_gradients
from ernie5.parallel.collectives import all_reduce
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.state import build_state, join_processes
from ernie5.parallel.verify import check_copies
from ernie5.records import Batch


class GridEngine(Engine):
    """One rank of a layout; `model` is whole and seeded alike on every rank, and is cut here."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        engine: EngineConfig,
        parallel: ParallelConfig,
        optim: OptimConfig,
        settings: StepSettings,
        device: torch.device,
    ) -> None:
        parallel.check_optimizer(optim.name)
        join_processes(device)
        self.model, self.device, self.settings = model, device, settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.magnitudes = settings.magnitudes.to(device)
        self._parallel = build_state(parallel.derive_dims(self.world_size), node_size=parallel.node_size)
        self.traffic = self._parallel.traffic
        self.dp_rank, self.dp_size = self._parallel.dp.coordinate, self._parallel.dp.size
        self._layout = apply_layout(model, state=self._parallel, parallel=parallel)
        model.to(device)
        check_copies(dict(model.named_parameters()), layout=self._layout)
        self._masters = make_masters(model, precision=engine.precision)
        groups = build_groups(model, weight_decay=optim.weight_decay, split_matrices=optim.name == "muon")
        groups = [
            dataclasses.replace(group, parameters=tuple(self._masters[name] for name in group.names))
            for group in groups
        ]
        self._optimizer = build_optimizer(groups, config=optim, peers=find_peers(self._parallel))
        if optim.name == "adamw":
            materialise_state(self._optimizer)
        self._step = MicroStep(model, config=settings.objectives)
        self._step.text_loss = self._layout.text_loss(vocab_size=model.config.vocab_size)
        self._updates = 0

    def accumulate(self, micro_batches: Sequence[Batch]) -> StepSums:
        """Forward and backward over `micro_batches`, then one sum of gradients over ranks."""
        self.model.train()
        batches = [self._layout.take(batch.to(self.device)) for batch in micro_batches]
        counts = global_counts(batches, reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        for batch in batches:
            share, terms, routing = self._step(batch, counts, self.magnitudes)
            share.backward()
            move_gradients(self.model, masters=self._masters)
            builder.add(share, terms=terms, routing=routing, tokens=batch.counts().tokens)
        sum_gradients(self._masters, layout=self._layout)
        return builder.finish(reduce=self.sum_over_ranks)

    def update(self, sums: StepSums, *, learning_rate: float) -> StepReport:
        """Clip by the norm over all ranks, step, copy masters, move balance bias and magnitudes."""
        gradients = {name: master.grad for name, master in self._masters.items()}
        norm = clip_over_ranks(gradients, layout=self._layout, max_norm=self.settings.clip_norm)
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            self._updates += 1
            copy_masters(self._masters, model=self.model)
            self.follow(sums)
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(sums=sums, grad_norm=norm, skipped=skipped)

    def poison(self) -> None:
        """NaN into every gradient of this rank."""
        poison_gradients(self._masters)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by name; collective."""
        return {name: self._layout.gather(master.grad, name=name).clone() for name, master in self._masters.items()}

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch) -> StepSums:
        """Forward without gradients on every rank's own batch."""
        self.model.eval()
        batch = self._layout.take(batch.to(self.device))
        counts = global_counts([batch], reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        share, terms, routing = self._step(batch, counts, self.magnitudes)
        builder.add(share, terms=terms, routing=routing, tokens=batch.counts().tokens)
        return builder.finish(reduce=self.sum_over_ranks)

    @torch.no_grad()
    def state(self) -> EngineState:
        """Whole tensors on the CPU of every rank, whatever the layout; collective."""
        parameters, moments = {}, {}
        for name, master in self._masters.items():
            parameters[name] = self._layout.gather(master.detach(), name=name).to("cpu", copy=True)
            for kind, value in self._optimizer.state[master].items():
                if kind != "step":
                    whole = self._layout.gather(value.detach(), name=name)
                    moments[f"{kind}/{name}"] = whole.to("cpu", torch.float32, copy=True)
        return EngineState(
            parameters=parameters,
            buffers=persistent_buffers(self.model),
            moments=moments,
            updates=self._updates,
            magnitudes=self.magnitudes.cpu().clone(),
        )

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        """Copy this rank's parts of `state` in, after checking every name and shape."""
        own = self.state()
        check_names(state.parameters, expected=own.parameters, what="parameters")
        check_names(state.moments, expected=own.moments, what="optimizer tensors")
        load_buffers(self.model, buffers=state.buffers)
        for name, master in self._masters.items():
            master.copy_(self._layout.cut(state.parameters[name], name=name))
            for kind, value in self._optimizer.state[master].items():
                if kind == "step":
                    value.fill_(state.updates)
                else:
                    value.copy_(self._layout.cut(state.moments[f"{kind}/{name}"], name=name))
        copy_masters(self._masters, model=self.model)
        self._updates = state.updates
        self.magnitudes = state.magnitudes.to(self.device)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that see other data (dp x cp)."""
        return all_reduce(values, axis=self._parallel.dp_cp)

    def gather(self, value: dict) -> list[dict]:
        """Collect a small value from every rank."""
        found: list = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[None]:
        """Gather the cut weights and put the plain seams back."""
        with self._layout.whole(self.model):
            yield

    def close(self) -> None:
        """Leave the process group (a group of one has nothing to leave)."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
