"""DeepSpeed behind the engine interface: any layout with ZeRO 0 to 3 over it, equal to the local engine.

DeepSpeed averages gradients over ranks; the losses here are already divided by global counts, so each rank's share is
multiplied by the number of ranks and the average becomes the sum. DeepSpeed's own division by the number of
micro-batches is switched off for the same reason.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ernie5.engine.config import EngineConfig
from ernie5.engine.clipping import clip_over_ranks
from ernie5.engine.deepspeed_apart import KeptApart
from ernie5.engine.deepspeed_config import DeepSpeedPlan, deepspeed_config
from ernie5.engine.deepspeed_launch import start_processes
from ernie5.engine.deepspeed_norm import own_norm, whole_gradients
from ernie5.engine.deepspeed_order import OrderedStep
from ernie5.engine.deepspeed_pipe import StagedPasses
from ernie5.engine.deepspeed_start import move_buffers, partition_parameters
from ernie5.engine.deepspeed_state import DeepSpeedState
from ernie5.engine.deepspeed_topology import place_parts
from ernie5.engine.interface import Engine, StateSlice, StepReport, StepSettings, StepSums
from ernie5.engine.micro_step import MicroStep, SumsBuilder, global_counts
from ernie5.engine.peers import cut_groups, find_spreads
from ernie5.engine.recompute import install_recompute
from ernie5.engine.sections import SectionRuns
from ernie5.observe.log import get_log
from ernie5.optim.build import build_optimizer
from ernie5.optim.config import OptimConfig
from ernie5.optim.flat_muon import FlatMuon
from ernie5.optim.groups import ParameterGroup, build_groups
from ernie5.parallel.apply import Layout, apply_layout
from ernie5.parallel.collectives import all_reduce
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.pipeline import Pipeline
from ernie5.parallel.state import build_state
from ernie5.parallel.verify import check_copies
from ernie5.records import Batch, TargetCounts


SUB_GROUP_ELEMENTS = 1_000_000_000
"""Elements of a rank's pieces that stage 3 steps at a time (DeepSpeed's own number): 4 GB for each copy in fp32."""


class DeepSpeedEngine(Engine):
    """One rank of a DeepSpeed run; a single process needs no launcher."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        engine: EngineConfig,
        parallel: ParallelConfig,
        optim: OptimConfig,
        settings: StepSettings,
        device: torch.device,
        micro_batches: int,
        micro_sequences: int,
        log_path: Path,
    ) -> None:
        start_processes(device, log_path=log_path)
        import deepspeed

        self.model, self.device, self.settings = model, device, settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        parallel.check_zero(engine.zero_stage)
        parallel.check_model(model.config)
        dims = parallel.derive_dims(self.world_size, kv_heads=model.config.kv_heads)
        parallel_state = build_state(dims, node_size=parallel.node_size)
        self.dp_rank, self.dp_size = parallel_state.dp.coordinate, parallel_state.dp.size
        self.magnitudes = settings.magnitudes.to(device)
        self._stage, self.updates = engine.zero_stage, 0
        is_outline = self._stage == 3 and any(parameter.is_meta for parameter in model.parameters())
        self._layout = apply_layout(model, state=parallel_state, parallel=parallel, is_drawn=not is_outline)
        self._data_axis, self._pp_axis = parallel_state.dp_cp, parallel_state.pp
        move_buffers(model, device=device) if is_outline else model.to(device)
        install_recompute(model, engine=engine, device=device)
        topology = place_parts(model, layout=self._layout)
        apart = KeptApart(self._layout, stage=self._stage)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        groups = build_groups(model, weight_decay=optim.weight_decay, split_matrices=optim.name == "muon")
        groups = apart.split_groups(groups)
        casts = engine.precision == "bf16" and self._stage == 0
        step: torch.nn.Module = MicroStep(
            model, config=settings.objectives, compute_dtype=torch.bfloat16 if casts else None
        )
        step.text_loss = self._layout.text_loss(vocab_size=model.config.vocab_size)
        self._step = step
        self._ordered = OrderedStep(step) if self._stage >= 2 else None
        plan = DeepSpeedPlan(
            micro_batches=micro_batches,
            micro_sequences=micro_sequences,
            dp=self._data_axis.size,
            num_params=sum(parameter.numel() for parameter in model.parameters()),
            layer_params=max(sum(p.numel() for p in layer.parameters()) for layer in model.layers),
            sub_group_elements=SUB_GROUP_ELEMENTS,
            pin_memory=device.type == "cuda",
        )
        optimizer = self._build_optimizer(groups, optim=optim)
        apart.mark_groups(optimizer)
        wrapped = self._prepare(step)
        apart.announce(wrapped)
        settled = deepspeed_config(engine, optim=optim, plan=plan)
        if is_outline:
            dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
            partition_parameters(model, layout=self._layout, config=settled, topology=topology, dtype=dtype)
        self._engine, _, _, _ = deepspeed.initialize(
            model=wrapped,
            optimizer=optimizer,
            mpu=topology,
            config=settled,
            dist_init_required=False,
        )
        _restore_buffers(model, buffers=buffers)
        named = dict(model.named_parameters())
        self._sums = whole_gradients(self._engine, parameters=named)
        if self._stage and self._sums is None:
            own_norm(self._engine, parameters=named, layout=self._layout)
        self._staged = self._stage_passes(model) if parallel.pp > 1 else None
        files = None if engine.nvme_path is None else Path(engine.nvme_path)
        self._state = DeepSpeedState(self._engine, model=model, stage=self._stage, layout=self._layout, files=files)
        self.check_copies()

    def accumulate(self, micro_batches: Sequence[Batch]) -> StepSums:
        """Forward and backward over this rank's micro-batches; the last backward reduces gradients over ranks."""
        self._engine.train()
        self.model.train()
        batches = [self._layout.take(batch.to(self.device)) for batch in micro_batches]
        counts = global_counts(batches, reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        if self._staged is not None:
            self._staged.train(batches, run=self._sections(builder, counts=counts))
            return builder.finish(reduce=self._sum_over_shares)
        for index, batch in enumerate(batches):
            # DeepSpeed's own count of micro-batches is fixed at its start, that of a step is not (batch.ramp).
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            share, terms, routing = self._engine(batch, counts, self.magnitudes)
            self._engine.backward(share * self._data_axis.size, scale_wrt_gas=False)
            builder.add(share, terms=terms, routing=routing, tokens=batch.counts().tokens)
        return builder.finish(reduce=self._sum_over_shares)

    def update(self, sums: StepSums, *, learning_rate: float) -> StepReport:
        """Clip, step, move balance bias and magnitudes; a norm that is not finite skips all of it on every rank."""
        if self._ordered is not None:
            self._ordered.check_order(largest=self._max_over_ranks, device=self.device)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._step_whole() if self._stage == 0 else self._step_sharded()
        skipped = not math.isfinite(norm)
        if not skipped:
            self.updates += 1
            self.follow(sums)
        return StepReport(sums=sums, grad_norm=torch.tensor(norm), skipped=skipped)

    def poison(self) -> None:
        """NaN into one parameter's gradient, which makes the norm of all NaN."""
        if self._sums is not None:
            self._poison_sums()
        else:
            self._state.poison_gradient()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Full reduced fp32 gradients by name; collective."""
        return self._state.gradients()

    @torch.no_grad()
    def evaluate_batch(self, batch: Batch) -> StepSums:
        """Forward without gradients on every rank's own batch."""
        self._engine.eval()
        self.model.eval()
        batch = self._layout.take(batch.to(self.device))
        counts = global_counts([batch], reduce=self.sum_over_ranks)
        builder = SumsBuilder(counts)
        if self._staged is not None:
            self._staged.evaluate([batch], run=self._sections(builder, counts=counts))
            return builder.finish(reduce=self._sum_over_shares)
        share, terms, routing = self._engine(batch, counts, self.magnitudes)
        builder.add(share, terms=terms, routing=routing, tokens=batch.counts().tokens)
        return builder.finish(reduce=self._sum_over_shares)

    def slices(self) -> Iterator[StateSlice]:
        """What DeepSpeed keeps on this rank."""
        return self._state.slices()

    def adopt(self, *, updates: int, magnitudes: torch.Tensor) -> None:
        """Go on from the values in `slices()`; collective."""
        self._state.adopt(updates=updates)
        self.updates, self.magnitudes = updates, magnitudes.to(self.device)

    def save_native(self, folder: Path, *, name: str) -> None:
        """DeepSpeed's own checkpoint, which its ds_to_universal.py takes as it is, and the scripts that it leaves
        beside it; collective."""
        from deepspeed.checkpoint import constants as keys

        version = {keys.UNIVERSAL_CHECKPOINT_VERSION_KEY: keys.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        self._engine.save_checkpoint(str(folder), tag=name, client_state={keys.UNIVERSAL_CHECKPOINT_INFO: version})

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that see other data (dp x cp)."""
        return all_reduce(values, axis=self._data_axis)

    @property
    def layout(self) -> Layout:
        """How the model is spread."""
        return self._layout

    def check_copies(self) -> None:
        """Raise EnvironmentFault where ranks that hold one part of a parameter hold other values; collective."""
        check_copies(self._state.parts(), layout=self._layout)

    def gather(self, value: dict) -> list[dict]:
        """Collect a small value from every rank."""
        found: list = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[None]:
        """Experts of other ranks join; stage 3 gathers all weights and takes its gathering hooks off before."""
        if self._stage < 3:
            with self._layout.whole(self.model):
                yield
            return
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        self._engine.empty_partition_cache()  # a validation leaves weights on their way, which nobody would wait for
        with unwrap_model_for_generation(self._engine), self._layout.whole(self.model):
            yield

    def close(self) -> None:
        """Leave the process group. A gloo group of one has nothing to leave and may serve the next engine of this
        process; NCCL complains at exit of any group that was not left."""
        if dist.is_initialized() and (self.world_size > 1 or dist.get_backend() == "nccl"):
            dist.destroy_process_group()

    def _build_optimizer(self, groups: Sequence[ParameterGroup], *, optim: OptimConfig) -> torch.optim.Optimizer:
        """What DeepSpeed steps: on flat pieces from stage 1 on, which Muon must know."""
        spreads = find_spreads(self._layout, device=self.device)
        if self._stage == 3:
            groups = cut_groups(groups, spreads=spreads, most_elements=SUB_GROUP_ELEMENTS)
        if optim.name == "muon" and self._stage:
            return FlatMuon(groups, config=optim, spreads=spreads)
        return build_optimizer(groups, config=optim, spreads=spreads)

    def _stage_passes(self, model: torch.nn.Module) -> StagedPasses:
        """What runs the sections of this pipeline stage; collective."""
        pipeline = Pipeline(
            self._layout.state,
            stages=self._layout.stages,
            width=model.config.width,
            dtype=next(model.parameters()).dtype,
            device=self.device,
        )
        if self.is_main:
            get_log().info("%s", self._layout.stages.describe())
        parameters = dict(model.named_parameters())
        return StagedPasses(self._engine, pipeline=pipeline, parameters=parameters, layout=self._layout)

    def _sections(self, builder: SumsBuilder, *, counts: TargetCounts) -> SectionRuns:
        return SectionRuns(self._step, counts, self.magnitudes, builder, times=self._data_axis.size)

    def _sum_over_shares(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that compute other parts of the objective: other data, or other sections of the model."""
        return all_reduce(self.sum_over_ranks(values), axis=self._pp_axis)

    def _prepare(self, step: torch.nn.Module) -> torch.nn.Module:
        """The module that DeepSpeed wraps: stages 2 and 3 need one order of gradients on all ranks."""
        if self._ordered is None:
            return step
        if self._stage == 2:
            self._ordered.watch_units()
        else:
            from deepspeed.utils import set_z3_leaf_module

            for unit in self._ordered.units:
                set_z3_leaf_module(unit, True)
        return self._ordered

    def _max_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def _step_whole(self) -> float:
        """Stage 0: clip by the norm that counts every expert once (DeepSpeed's own norm does not, its issue 8475)."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = float(clip_over_ranks(gradients, layout=self._layout, max_norm=self.settings.clip_norm))
        if not math.isfinite(norm):
            for parameter in self.model.parameters():
                parameter.grad = None
        self._engine.step()
        return norm

    def _step_sharded(self) -> float:
        if self._sums is None:
            self._engine.step()
            if not self._engine.was_step_applied():
                self._state.forget_gradients()
                return math.inf
            return float(self._engine.get_global_grad_norm())
        norm = float(clip_over_ranks(self._sums, layout=self._layout, max_norm=self.settings.clip_norm))
        if not math.isfinite(norm):  # what is not finite may stand in the part of another rank alone
            self._poison_sums()
        self._engine.step()
        return norm

    def _poison_sums(self) -> None:
        next(iter(self._sums.values())).fill_(math.nan)


def _restore_buffers(model: torch.nn.Module, *, buffers: dict[str, torch.Tensor]) -> None:
    """Undo DeepSpeed's cast of buffers to bf16: the balance bias moves by 1e-4, which bf16 would round away."""
    for module_name, module in model.named_modules():
        for name, buffer in _own_buffers(module):
            full = f"{module_name}.{name}" if module_name else name
            if buffer.dtype != buffers[full].dtype:
                setattr(module, name, buffers[full].to(buffer.device))


def _own_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(module.named_buffers(recurse=False))
