"""Tokens made into parcels: one for each place that holds any of a token's experts, however many it holds."""

from __future__ import annotations

import dataclasses

import torch

from ernie5.model.interfaces import NO_EXPERT, Parcels
from ernie5_kernels.token_rows import RowPlan, plan_rows, spread_rows


@dataclasses.dataclass(frozen=True)
class Leg:
    """One part of the way, and what its way back needs. plan: what was there before -> its parcels, ordered by
    destination; send, receive: parcels per ep rank."""

    plan: RowPlan
    send: tuple[int, ...]
    receive: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RemoteParcels(Parcels):
    """Parcels that have arrived. legs of their way; pooled: parcels per etp rank; tokens: per tp rank, together N."""

    legs: tuple[Leg, ...]
    pooled: tuple[int, ...]
    tokens: tuple[int, ...]


def address(
    parcels: Parcels, *, destination_of: torch.Tensor, ranks: int
) -> tuple[Parcels, RowPlan, tuple[int, ...]]:
    """One parcel per (destination, item) that has any expert there, ordered by destination, then by item; which
    item each is of; and the parcels per destination.

    destination_of [E] int64: the rank, out of `ranks`, to which choices of an expert go.
    """
    destination = destination_of[parcels.ids.clamp(min=0)].masked_fill(parcels.ids == NO_EXPERT, ranks)
    wanted = torch.zeros(parcels.rows.shape[0], ranks + 1, dtype=torch.bool, device=parcels.ids.device)
    wanted = wanted.scatter_(1, destination, True)[:, :ranks]
    places, owners = wanted.T.nonzero(as_tuple=True)
    plan = plan_rows(owners, tokens=parcels.rows.shape[0])
    is_there = destination.index_select(0, owners) == places.unsqueeze(1)
    made = Parcels(
        rows=spread_rows(parcels.rows, plan=plan),
        ids=parcels.ids.index_select(0, owners).masked_fill(~is_there, NO_EXPERT),
        weights=spread_rows(parcels.weights, plan=plan) * is_there,
        num_experts=parcels.num_experts,
    )
    return made, plan, tuple(wanted.sum(0).tolist())  # host sync: sizes to send


def keep_local(parcels: Parcels, *, first: int, local_experts: int) -> Parcels:
    """Ids counted from this rank's first expert; those of other ranks' experts become NO_EXPERT."""
    ids = parcels.ids - first
    ids = ids.masked_fill((ids < 0) | (ids >= local_experts), NO_EXPERT)
    return dataclasses.replace(parcels, ids=ids, num_experts=local_experts)
