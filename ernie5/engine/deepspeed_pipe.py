"""Pipeline stages under DeepSpeed's ZeRO-1: our schedule runs the passes, DeepSpeed reduces, partitions and steps.

DeepSpeed's `coalesce_grad_reduction` leaves the gradients of all backward passes within it on the parameters and
reduces them at its end, once, so it does not matter to ZeRO in which order, or in how many pieces, they were made. Its
optimizer for stage 1 in bf16 has no hooks and takes them, as from its own pipelines, when it is told.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch

from ernie5.engine.deepspeed_norm import whole_gradients
from ernie5.parallel.apply import Layout
from ernie5.parallel.collectives import all_reduce, sum_among
from ernie5.parallel.pipeline import Pipeline, RunSection
from ernie5.records import Batch


class StagedPasses:
    """The passes of one stage; engine: DeepSpeed's, of stage 1; parameters: this stage's, by name."""

    def __init__(
        self, engine: object, *, pipeline: Pipeline, parameters: Mapping[str, torch.nn.Parameter], layout: Layout
    ) -> None:
        self._engine, self._pipeline, self._layout = engine, pipeline, layout
        self._parameters = dict(parameters)
        self._sums = whole_gradients(engine, parameters=parameters)

    def train(self, batches: Sequence[Batch], *, run: RunSection) -> None:
        """Forward and backward of all micro-batches through this stage, then the reduction; collective.

        The shares that `run` returns are already multiplied by dp x cp, by which DeepSpeed divides.
        """
        with self._reduced_at_the_end():
            # with bf16 weights DeepSpeed adds up gradients in fp32, beside them
            add_up = functools.partial(self._engine.optimizer.backward_epilogue, clear_lp_grads=True)
            self._pipeline.train(batches, run=run, after_backward=add_up)
            for name in self._parameters:
                self._complete(self._gradient(name), name=name)

    def evaluate(self, batches: Sequence[Batch], *, run: RunSection) -> None:
        """Forward alone; call it without gradients."""
        self._pipeline.evaluate(batches, run=run)

    @contextlib.contextmanager
    def _reduced_at_the_end(self) -> Iterator[None]:
        if self._sums is None:
            with self._engine.coalesce_grad_reduction():
                yield
            self._engine.set_gradient_accumulation_boundary(True)
        else:
            yield
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()

    def _gradient(self, name: str) -> torch.Tensor:
        """What will be reduced. A missing gradient is zero: DeepSpeed would skip it, and its buckets would shift."""
        if self._sums is not None:
            return self._sums[name]
        optimizer, parameter = self._engine.optimizer, self._parameters[name]
        if optimizer.get_gradient_for_reduction(parameter) is None:
            parameter.grad = torch.zeros_like(parameter)
            optimizer.backward_epilogue()
        return optimizer.get_gradient_for_reduction(parameter)

    @torch.no_grad()
    def _complete(self, gradient: torch.Tensor, *, name: str) -> None:
        """Sum over dp x cp what two stages share, then over both in their order: DeepSpeed would sum it in each stage
        by itself, where the order of ranks may differ. Of dp x cp the first rank then brings all, the others zeros."""
        axis, stages = self._layout.state.dp_cp, self._layout.shards[name].stages
        if len(stages) > 1:
            total = sum_among(all_reduce(gradient, axis=axis), axis=self._layout.state.pp, members=stages)
            gradient.copy_(total) if axis.coordinate == 0 else gradient.zero_()
