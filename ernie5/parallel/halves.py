"""Tokens of an expert layer in two halves: while one half travels, there or back, the experts have the other.

Order of a pass: both halves leave; shared experts; the first half arrives, is computed and leaves for home; the second
half likewise; both come home. Autograd runs the nodes in reverse, so the gradients of the second half's experts are
computed while those of the first travel, and the other way round. The receivers of both halves are told of them before
either leaves: on one communicator collectives run one after another, and these few bytes would wait for the rows.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from ernie5.model.interfaces import Parcels, Routing
from ernie5.parallel.expert import StagedDispatcher


class RoutedLayer(Protocol):
    """What of a layer is used here."""

    shared: torch.nn.Module | None

    def run_shared(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> what the shared experts add."""

    def run_experts(self, parcels: Parcels) -> torch.Tensor:
        """Parcels -> weighted outputs, summed per parcel [M, D]."""


class Halves:
    """Takes the place of a layer's `run_routed`."""

    def __init__(self, layer: RoutedLayer, *, dispatcher: StagedDispatcher) -> None:
        self._layer, self._dispatcher = layer, dispatcher

    def __call__(self, hidden: torch.Tensor, *, routing: Routing) -> torch.Tensor:
        """[B, T, D] -> what all experts make of it; a rank halves its own tokens, and a half may be empty."""
        layer, dispatcher = self._layer, self._dispatcher
        flat, experts = hidden.flatten(0, 1), routing.num_experts
        cut = flat.shape[0] // 2
        halves = [
            dispatcher.prepare(flat[part], routing=_part(routing, part=part), num_experts=experts)
            for part in (slice(None, cut), slice(cut, None))
        ]
        sent = [dispatcher.ship(half) for half in halves]
        beside = None if layer.shared is None else layer.run_shared(hidden)
        going = []
        for half in sent:
            parcels = dispatcher.receive(half)
            going.append((dispatcher.go_home(layer.run_experts(parcels), parcels=parcels), parcels))
        out = torch.cat([dispatcher.come_home(back, parcels=parcels) for back, parcels in going]).view_as(hidden)
        return out if beside is None else out + beside


def _part(routing: Routing, *, part: slice) -> Routing:
    return dataclasses.replace(routing, choices=routing.choices[part], weights=routing.weights[part])
