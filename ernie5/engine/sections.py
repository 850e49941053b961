"""The sections of one step, as a pipeline runs them."""

from __future__ import annotations

import dataclasses

import torch

from ernie5.engine.micro_step import MicroStep, SumsBuilder
from ernie5.model.shard_plan import Section
from ernie5.parallel.pipeline import Passed
from ernie5.records import Batch, TargetCounts


@dataclasses.dataclass(frozen=True)
class SectionRuns:
    """The sections of one step as a pipeline asks for them (its RunSection); what they add up to is recorded in
    `builder`. times: factor of every share, for an engine that averages gradients."""

    step: MicroStep
    counts: TargetCounts
    divisors: torch.Tensor
    builder: SumsBuilder
    times: int = 1

    def __call__(self, batch: Batch, *, section: Section, hidden: torch.Tensor | None) -> Passed:
        """Run one section; hidden [B, T, D] from the one before, None for the first."""
        made = self.step.run_section(
            batch, counts=self.counts, divisors=self.divisors, section=section, hidden=hidden
        )
        self.builder.add(made.share, terms=made.terms, routing=made.routing, tokens=batch.counts().tokens)
        return Passed(hidden=made.hidden, share=made.share * self.times)
