"""One order of gradients on every rank, and for ZeRO-3 units that are the same on every rank.

DeepSpeed's stages 2 and 3 put a gradient into a reduction bucket when autograd delivers it, and add up the buckets of
all ranks position by position. A rank with images delivers the gradients of the vision encoder last, a rank without
delivers their zeros first: buckets of different parameters would be added up in silence.

Autograd runs nodes in the reverse of the order in which forward created them, and delivers a gradient when the last
node that contributes has run. So each parameter gets one more, empty contribution, created at a fixed place: before
the layer for a layer's parameters, before everything for the rest. It is the last to run, on every rank in the same
order, and gradients still arrive layer by layer, so that none waits for the end of the pass.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from ernie5.engine.micro_step import MicroStep
from ernie5.errors import NumericsError
from ernie5.records import Batch, LossTerms, RoutingStats, TargetCounts


class OrderedStep(torch.nn.Module):
    """The step as DeepSpeed sees it: `units` (layers that always run) as children, all other parameters its own.

    The modules around the layers are hidden, because some of them run only where a batch has their modality and
    ZeRO-3 gathers by module; as parameters of this module they are whole from the first to the last operation.
    """

    def __init__(self, step: MicroStep) -> None:
        super().__init__()
        self._hidden = (step,)
        model = step.model
        self.units = torch.nn.ModuleList([*model.layers, *model.mtp])
        inside = {id(parameter) for parameter in self.units.parameters()}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        for index, parameter in enumerate(rest):
            self.register_parameter(f"rest_{index}", parameter)
        self._zeros: list[torch.Tensor] = []
        self._arrived: list[int] = []
        for index, parameter in enumerate(self.parameters()):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._witness(index))

    def watch_units(self) -> None:
        """Fix the order within the units. Not for ZeRO-3, which hands over a unit's gradients at once and in order."""
        for unit in self.units:
            unit.register_forward_pre_hook(lambda module, _: self._hold(module.parameters()))

    def forward(
        self, batch: Batch, counts: TargetCounts, divisors: torch.Tensor
    ) -> tuple[torch.Tensor, LossTerms, RoutingStats]:
        """As MicroStep; the share has the gradient path that fixes the order."""
        self._zeros = []
        self._hold(self.parameters(recurse=False))
        share, terms, routing = self._hidden[0](batch, counts, divisors)
        if self._zeros:
            share = share + torch.stack(self._zeros).sum()
        self._zeros = []
        return share, terms, routing

    def check_order(self, *, largest: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
        """Raise NumericsError on every rank if gradients arrived in another order somewhere; `largest`: max over ranks.

        Called once per step, before the update: a unit that ran on some ranks alone would otherwise go unnoticed.
        """
        digest = zlib.crc32(b",".join(b"%d" % index for index in self._arrived))
        self._arrived.clear()
        high, low = largest(torch.tensor([digest, -digest], device=device)).tolist()
        if high != -low:
            raise NumericsError(
                "the ranks produced gradients in different orders, so DeepSpeed has added up gradients of different "
                "parameters. A layer ran on some ranks alone. Set engine.zero_stage: 1, which reduces in the order of "
                "parameters, or make every layer run on every rank"
            )

    def _hold(self, parameters: object) -> None:
        if torch.is_grad_enabled():
            self._zeros += [_Hold.apply(parameter) for parameter in parameters if parameter.requires_grad]

    def _witness(self, index: int) -> Callable[[torch.Tensor], None]:
        return lambda _: self._arrived.append(index)


class _Hold(torch.autograd.Function):
    """A zero that depends on a parameter and gives it no gradient; autograd still waits for it."""

    @staticmethod
    def forward(ctx: object, parameter: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=parameter.device)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> None:
        return None
