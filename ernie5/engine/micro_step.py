"""Forward pass plus losses of one micro-batch, as one module, and the book-keeping of a step's sums.

One module, because ZeRO-3 gathers parameters around modules: the text head that the loss applies in chunks must be
whole while the loss runs. All engines call the same code, so that they can differ only in how they step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from ernie5.engine.interface import StepSums
from ernie5.model.shard_plan import Section
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import combine, combine_routing, losses
from ernie5.objectives.next_token import TextLoss
from ernie5.records import Batch, LossTerms, ModelOutput, RoutingStats, TargetCounts
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy

@dataclasses.dataclass(frozen=True)
class SectionStep:
    """What a section of the model made of one micro-batch; of a whole model, everything. share: its part of the step's
    objective, 0-d fp32; terms: sums of nats; hidden [B, T, D] for the next section."""

    share: torch.Tensor
    terms: LossTerms
    routing: RoutingStats
    hidden: torch.Tensor


Sum = Callable[[torch.Tensor], torch.Tensor]


class MicroStep(torch.nn.Module):
    """Model and objectives. `text_loss` is a seam: the cross-entropy that fits how the text head is held.

    compute_dtype: the model runs on copies of its parameters in this dtype, made in every pass, so that the parameters
    can be the fp32 masters themselves and their gradients add up in fp32; None runs the parameters as they are.
    """

    def __init__(
        self, model: torch.nn.Module, *, config: ObjectivesConfig, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self._compute_dtype = compute_dtype
        self.model = model
        self.text_loss: TextLoss = linear_cross_entropy
        self._config = config

    def forward(
        self, batch: Batch, counts: TargetCounts, divisors: torch.Tensor
    ) -> tuple[torch.Tensor, LossTerms, RoutingStats]:
        """Return (share of the step's objective 0-d fp32, sums of nats, routing); counts are the whole step's."""
        step = self.run_section(batch, counts=counts, divisors=divisors, section=None, hidden=None)
        return step.share, step.terms, step.routing

    def run_section(
        self,
        batch: Batch,
        *,
        counts: TargetCounts,
        divisors: torch.Tensor,
        section: Section | None,
        hidden: torch.Tensor | None,
    ) -> SectionStep:
        """A part of the same: shares, sums and loads of all sections (None: the whole model) add up to `forward`'s."""
        output = self._run(batch, section=section, hidden=hidden)
        terms = losses(output, batch, text_loss=self.text_loss)
        share = combine(terms, counts=counts, divisors=divisors, config=self._config)
        share = share + combine_routing(
            output.routing, tokens=batch.counts().tokens, total_tokens=counts.tokens, config=self._config
        )
        return SectionStep(share + output.touched.float(), terms, output.routing, output.hidden)

    def _run(self, batch: Batch, *, section: Section | None, hidden: torch.Tensor | None) -> ModelOutput:
        part = {"section": section, "hidden": hidden}
        if self._compute_dtype is None:
            return self.model(batch, **part)
        copies = {name: parameter.to(self._compute_dtype) for name, parameter in self.model.named_parameters()}
        return torch.func.functional_call(self.model, copies, (batch,), part)


def global_counts(micro_batches: Sequence[Batch], *, reduce: Sum) -> TargetCounts:
    """Targets of the whole step: summed over micro-batches, then over ranks by `reduce`."""
    total = micro_batches[0].counts()
    for batch in micro_batches[1:]:
        total = total + batch.counts()
    names = [f.name for f in dataclasses.fields(TargetCounts)]
    summed = reduce(torch.stack([getattr(total, name) for name in names]))
    return TargetCounts(**dict(zip(names, summed.unbind(), strict=True)))


class SumsBuilder:
    """Adds up the micro-batches of a step on the device; one all-reduce at the end."""

    def __init__(self, counts: TargetCounts) -> None:
        self._counts = counts
        self._parts: list[list[torch.Tensor]] = []
        self._shape, self._groups = torch.Size((0, 0)), 0

    def add(self, share: torch.Tensor, *, terms: LossTerms, routing: RoutingStats, tokens: torch.Tensor) -> None:
        """Record one micro-batch; `tokens` weighs its routing losses."""
        self._shape, self._groups = routing.loads.shape, routing.group_loads.shape[1]
        weight = tokens / self._counts.tokens.clamp(min=1)
        scalars = [getattr(terms, f.name) for f in dataclasses.fields(LossTerms)] + [share]
        weighted = [routing.switch_loss * weight, routing.sequence_loss * weight, routing.z_loss * weight]
        self._parts.append(
            [
                torch.stack([value.detach().double() for value in scalars + weighted]),
                routing.loads.detach().double().flatten(),
                routing.group_loads.detach().double().flatten(),
            ]
        )

    def finish(self, *, reduce: Sum) -> StepSums:
        """Sum over micro-batches and, by `reduce`, over ranks."""
        summed = [torch.stack(column).sum(0) for column in zip(*self._parts, strict=True)]
        sizes = [part.numel() for part in summed]
        scalars, loads, group_loads = reduce(torch.cat(summed)).split(sizes)
        names = [f.name for f in dataclasses.fields(LossTerms)]
        switch, sequence, z = scalars[len(names) + 1 :].float().unbind()
        layers, experts = self._shape
        return StepSums(
            terms=LossTerms(**dict(zip(names, scalars[: len(names)].unbind(), strict=True))),
            counts=self._counts,
            routing=RoutingStats(
                loads=loads.view(layers, experts).float(),
                group_loads=group_loads.view(layers, self._groups, experts).float(),
                switch_loss=switch,
                sequence_loss=sequence,
                z_loss=z,
            ),
            objective=scalars[len(names)],
        )
