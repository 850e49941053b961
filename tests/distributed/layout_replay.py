"""Routing choices of one run noted by token, and made again in another layout, which then differs by rounding alone.

Top-k amplifies rounding: where two experts have nearly the same preference, layouts choose differently, and from there
on they train different models. A replayed run makes the choices of its yardstick and notes where its own would have
been others; up to the first such place it is the free run, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator

import torch

from ernie5.engine.interface import Engine
from ernie5.model.interfaces import Routing
from ernie5.model.moe.router import Router
from ernie5.parallel.apply import Layout
from ernie5.parallel.collectives import even_sizes
from ernie5.records import Batch, TokenKind


@dataclasses.dataclass(frozen=True)
class Noted:
    """One router's decision over a whole row: choices [T, K], ascending; preference [T, E]."""

    choices: torch.Tensor
    preference: torch.Tensor


@dataclasses.dataclass(frozen=True, order=True)
class Divergence:
    """A token whose experts would have been others; gap: how much less the yardstick preferred them."""

    step: int
    micro_batch: int
    layer: int
    column: int
    gap: float


Notes = dict[tuple[int, int, int], Noted]
"""By step, micro-batch of the step, and layer among those that route."""


class Choices:
    """Notes the choices of every router of `engine` in the steps that it watches; where `recorded` ones are given, it
    makes those instead. Micro-batches hold one row each."""

    def __init__(self, engine: Engine, *, layout: Layout | None, recorded: Notes | None) -> None:
        self.noted: Notes = {}
        self.divergences: set[Divergence] = set()
        self._layout, self._recorded = layout, recorded
        self._step = 0
        self._parts: list[tuple[int, torch.Tensor]] = []
        self._calls: Counter[tuple[int, bool]] = Counter()
        for layer, router in enumerate(engine.model.routers()):
            router.register_forward_hook(self._hook(layer), with_kwargs=True)

    @contextlib.contextmanager
    def watch(self, batches: list[Batch], *, step: int, first: int, stride: int) -> Iterator[None]:
        """Within it this rank's `batches` run: the micro-batches first, first + stride, ... of the step."""
        self._step, self._calls = step, Counter()
        for index, batch in enumerate(batches):
            columns = torch.arange(batch.token_ids.shape[1]).unsqueeze(0)
            numbered = dataclasses.replace(batch, token_ids=columns)
            part, own = (one if self._layout is None else self._layout.take(one) for one in (numbered, batch))
            # padding decides nothing; under context parallelism it stands in for columns of other ranks
            columns = torch.where(own.kinds == TokenKind.PADDING, -1, part.token_ids).flatten()
            self._parts.append((first + index * stride, columns))
        yield
        self._parts = []

    def _part(self, layer: int) -> tuple[int, torch.Tensor]:
        """Micro-batch and columns of this call of a router. In every engine a layer meets the micro-batches in order,
        and so it does when backward computes it again, in a pipeline at another time."""
        call = layer, torch._C._current_graph_task_id() >= 0
        self._calls[call] += 1
        return self._parts[self._calls[call] - 1]

    def _hook(self, layer: int):
        def choose(router: Router, inputs: tuple, asked: dict, routing: Routing) -> Routing | None:
            if not self._parts:
                return None
            micro_batch, columns = self._part(layer)
            with torch.no_grad():
                preference = router.scores(*inputs, active=asked["active"])[0] + router.balance_bias
            own = routing.choices.sort(1).values
            if self._recorded is None:
                self.noted[self._step, micro_batch, layer] = Noted(own, preference)
                return None
            columns = self._own_columns(columns, tokens=own.shape[0])
            there = self._recorded[self._step, micro_batch, layer]
            wanted = torch.where((columns < 0).unsqueeze(1), own, there.choices[columns])
            differs = (own != wanted).any(1).nonzero().flatten()
            if not differs.numel():
                return None
            for token in differs.tolist():
                column = int(columns[token])
                gap = _gap(there.preference[column], wanted=wanted[token], found=own[token])
                self.divergences.add(Divergence(self._step, micro_batch, layer, column, gap))
            choices = routing.choices.index_copy(0, differs, wanted[differs])
            return router.forward(*inputs, **asked, choices=choices)

        return choose

    def _own_columns(self, columns: torch.Tensor, *, tokens: int) -> torch.Tensor:
        """Those of a rank that holds a part of the sequence, where it does."""
        if tokens == columns.numel():
            return columns
        axis = self._layout.state.tp
        return columns.split(even_sizes(columns.numel(), axis=axis))[axis.coordinate]


def first_divergences(found: set[Divergence]) -> list[Divergence]:
    """Those that no other one can have caused: of the first step, in the first layer of each micro-batch."""
    step = min((one.step for one in found), default=0)
    first = sorted(one for one in found if one.step == step)
    layers = {micro: min(one.layer for one in first if one.micro_batch == micro) for micro in {
        one.micro_batch for one in first
    }}
    return [one for one in first if one.layer == layers[one.micro_batch]]


def _gap(preference: torch.Tensor, *, wanted: torch.Tensor, found: torch.Tensor) -> float:
    """How much the best that was given up was preferred to the worst that took its place."""
    given_up, taken = set(wanted.tolist()) - set(found.tolist()), set(found.tolist()) - set(wanted.tolist())
    return float(max(preference[list(given_up)]) - min(preference[list(taken)]))
