"""Plain PyTorch on any layout of the grids: the local engine, with the sums over ranks that a layout needs.

Every rank's share of the objective is already divided by global counts, so gradients are summed, never averaged: those
of experts over their replicas (edp), all others over dp x cp; a weight that two pipeline stages hold, over both.
Nothing is scaled by a degree.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ernie5.engine.clipping import norm_over_ranks
from ernie5.engine.config import EngineConfig
from ernie5.engine.interface import Engine, StateSlice, StepReport, StepSettings, StepSums
from ernie5.engine.local import (
    adopt_masters,
    copies_of,
    make_masters,
    move_gradients,
    poison_gradients,
)
from ernie5.engine.micro_step import MicroStep, SumsBuilder, global_counts
from ernie5.engine.peers import find_spreads
from ernie5.engine.sections import SectionRuns
from ernie5.engine.slices import buffer_slices, optimizer_slices
from ernie5.engine.recompute import install_recompute
from ernie5.observe.log import get_log
from ernie5.optim.adamw import materialise_state
from ernie5.optim.build import build_optimizer
from ernie5.optim.clip import clip_factor
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import build_groups
from ernie5.parallel.apply import Layout, apply_layout
from ernie5.parallel.buckets import sum_gradients
from ernie5.parallel.collectives import all_reduce
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.held import held_parts, written_names
from ernie5.parallel.pipeline import Pipeline
from ernie5.parallel.state import build_state, join_processes
from ernie5.parallel.verify import check_copies
from ernie5.records import Batch, TargetCounts


class GridEngine(Engine):
    """One rank of a layout; `model` is an outline (or whole and alike on every rank), and becomes this rank's part."""

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
        optim.check_engine(kind="grid", precision=engine.precision)
        parallel.check_model(model.config)
        join_processes(device)
        self.model, self.device, self.settings = model, device, settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.magnitudes = settings.magnitudes.to(device)
        dims = parallel.derive_dims(self.world_size, kv_heads=model.config.kv_heads)
        self._parallel = build_state(dims, node_size=parallel.node_size)
        self.traffic = self._parallel.traffic
        self.dp_rank, self.dp_size = self._parallel.dp.coordinate, self._parallel.dp.size
        self._layout = apply_layout(model, state=self._parallel, parallel=parallel)
        model.to(device)
        install_recompute(model, engine=engine, device=device)
        self.check_copies()
        self._masters = make_masters(model, precision=engine.precision)
        groups = build_groups(model, weight_decay=optim.weight_decay, split_matrices=optim.name == "muon")
        groups = [
            dataclasses.replace(group, parameters=tuple(self._masters[name] for name in group.names))
            for group in groups
        ]
        copies = copies_of(self._masters, model=model)
        spreads = find_spreads(self._layout, device=device)
        self._optimizer = build_optimizer(groups, config=optim, spreads=spreads, copies=copies)
        if optim.name == "adamw":
            materialise_state(self._optimizer)
        self._step = MicroStep(model, config=settings.objectives)
        self._step.text_loss = self._layout.text_loss(vocab_size=model.config.vocab_size)
        self._pipeline = Pipeline(
            self._parallel,
            stages=self._layout.stages,
            width=model.config.width,
            dtype=next(model.parameters()).dtype,
            device=device,
        )
        if self.is_main and parallel.pp > 1:
            get_log().info("%s", self._layout.stages.describe())
        self.updates = 0

    def accumulate(self, micro_batches: Sequence[Batch]) -> StepSums:
        """Forward and backward over `micro_batches`, then one sum of gradients over ranks."""
        self.model.train()
        batches = [self._layout.take(batch.to(self.device)) for batch in micro_batches]
        counts = global_counts(batches, reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        self._pipeline.train(
            batches,
            run=self._sections(builder, counts=counts),
            after_backward=lambda: move_gradients(self.model, masters=self._masters),
        )
        # sums first: of a group's first call NCCL wants all ranks, and only some stages share gradients
        sums = builder.finish(reduce=self._sum_over_shares)
        sum_gradients(self._masters, layout=self._layout)
        return sums

    def update(self, sums: StepSums, *, learning_rate: float) -> StepReport:
        """Clip by the norm over all ranks, step masters and the model, move balance bias and magnitudes."""
        gradients = {name: master.grad for name, master in self._masters.items()}
        norm = norm_over_ranks(gradients, layout=self._layout)
        skipped = not bool(torch.isfinite(norm))
        if not skipped:
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step(gradient_scale=clip_factor(norm, max_norm=self.settings.clip_norm))
            self.updates += 1
            self.follow(sums)
        self._optimizer.zero_grad(set_to_none=True)
        return StepReport(sums=sums, grad_norm=norm, skipped=skipped)

    def poison(self) -> None:
        """NaN into every gradient of this rank."""
        poison_gradients(self._masters)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by name; collective."""
        own = {name: master.grad for name, master in self._masters.items()}
        return {name: self._collect(own.get(name), name=name).clone() for name in self._layout.shards}

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch) -> StepSums:
        """Forward without gradients on every rank's own batch."""
        self.model.eval()
        batch = self._layout.take(batch.to(self.device))
        counts = global_counts([batch], reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        self._pipeline.evaluate([batch], run=self._sections(builder, counts=counts))
        return builder.finish(reduce=self._sum_over_shares)

    def slices(self) -> Iterator[StateSlice]:
        """This rank's parts; of equal copies one rank saves each."""
        parts = held_parts(self._layout)
        written = written_names(self._layout, parts=parts)
        for name, master in self._masters.items():
            yield from optimizer_slices(
                self._optimizer, master=master, name=name, held=parts[name], is_written=name in written
            )
        yield from buffer_slices(self.model, is_written=self.is_main)

    def adopt(self, *, updates: int, magnitudes: torch.Tensor) -> None:
        """Copy masters to the model and set the counters."""
        adopt_masters(self._masters, optimizer=self._optimizer, model=self.model, updates=updates)
        self.updates, self.magnitudes = updates, magnitudes.to(self.device)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that see other data (dp x cp)."""
        return all_reduce(values, axis=self._parallel.dp_cp)

    @property
    def layout(self) -> Layout:
        """How the model is spread."""
        return self._layout

    def check_copies(self) -> None:
        """Raise EnvironmentFault where ranks that hold one part of a parameter hold other values; collective."""
        check_copies(self.model.named_parameters(), layout=self._layout)

    def _sum_over_shares(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that compute other parts of the objective: other data, or other sections of the model."""
        return all_reduce(self.sum_over_ranks(values), axis=self._parallel.pp)

    def _sections(self, builder: SumsBuilder, *, counts: TargetCounts) -> SectionRuns:
        return SectionRuns(self._step, counts, self.magnitudes, builder)

    def _collect(self, part: torch.Tensor | None, *, name: str) -> torch.Tensor:
        """The whole of a tensor like the master of `name`; None on stages without it. Collective."""
        part, like = None if part is None else part.detach(), next(iter(self._masters.values()))
        return self._layout.collect(part, name=name, dtype=like.dtype, device=self.device)

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
