"""Expert parallelism: tokens travel to the ranks that hold their experts, and their weighted outputs travel back.

Seven stages, each a function of the one before: prepare, send, arrange, (experts), arrange_back, send_back, combine.
A token goes once to each rank that holds any of its chosen experts, however many those are; there the rows are
multiplied out to one per choice, and the weighted outputs of one token are summed before they go back. Nothing is
dropped or padded; a rank whose experts get no token takes part with zero rows.

With etp > 1 each of the ranks that share an expert holds some columns of it: after `send` they pool their rows, and
before `send_back` their partial outputs are summed and parted again.
"""

from __future__ import annotations

import abc
import dataclasses

import torch

from ernie5.model.interfaces import DispatchedRows, Routing
from ernie5.parallel.collectives import (
    all_gather,
    all_to_all,
    even_sizes,
    exchange,
    exchange_rows,
    gather,
    gather_for_work,
    own_part,
    reduce_scatter,
    split,
)
from ernie5.parallel.bags import Bags, bag_rows, spread_bags, sum_bags
from ernie5.parallel.state import Axis, ParallelState

NO_EXPERT = -1


@dataclasses.dataclass(frozen=True)
class Parcels:
    """Tokens on their way: rows [M, D]; ids [M, K] int64 local expert or NO_EXPERT; weights [M, K]."""

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Journey:
    """What the way back needs. bags: token -> its parcels; send, receive: parcels per ep rank; pooled: parcels per
    etp rank; tokens: per tp rank, together N."""

    bags: Bags
    send: tuple[int, ...]
    receive: tuple[int, ...]
    pooled: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RemoteRows(DispatchedRows):
    """DispatchedRows between ranks: `sources` [R] is the received parcel of each row, `places` the bags' members."""

    bags: Bags
    journey: Journey


class StagedDispatcher(abc.ABC):
    """TokenDispatcher over ep and etp; what differs by transport is prepare, send and send_back.

    Tokens that tp ranks hold in common (`is_replicated`) are first shared out among them: in the expert grid every
    rank brings tokens of its own.
    """

    def __init__(self, state: ParallelState, *, is_replicated: bool = True) -> None:
        self.ep, self._etp, self._tp = state.ep, state.etp, state.tp
        self._shares = is_replicated and state.tp.size > 1

    def dispatch(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> RemoteRows:
        """hidden [N, D] -> rows of this rank's experts, from all ranks of the block."""
        tokens = even_sizes(hidden.shape[0], axis=self._tp) if self._shares else [hidden.shape[0]]
        choices, weights = routing.choices, routing.weights
        if self._shares:
            hidden = split(hidden, axis=self._tp, sizes=tokens)
            weights = split(weights, axis=self._tp, sizes=tokens)
            choices = own_part(choices, axis=self._tp, sizes=tokens)
        local_experts = num_experts // self.ep.size
        parcels, bags, send = self.prepare(Parcels(hidden, choices, weights), local_experts=local_experts)
        parcels, receive = self.send(parcels, send=send, local_experts=local_experts)
        parcels, pooled = self.pool(parcels)
        journey = Journey(bags, send, receive, pooled, tuple(tokens))
        return arrange(parcels, journey=journey, local_experts=local_experts)

    def combine(self, rows: torch.Tensor, *, dispatched: RemoteRows) -> torch.Tensor:
        """Weighted outputs rows [R, D] of this rank's experts -> sums per token [N, D] of this rank."""
        journey = dispatched.journey
        parcels = sum_bags(rows, bags=dispatched.bags)
        parcels = reduce_scatter(parcels, axis=self._etp, sizes=journey.pooled)
        parcels = self.send_back(parcels, journey=journey)
        out = sum_bags(parcels, bags=journey.bags)
        return gather(out, axis=self._tp, sizes=journey.tokens) if self._shares else out

    @abc.abstractmethod
    def prepare(self, tokens: Parcels, *, local_experts: int) -> tuple[Parcels, Bags, tuple[int, ...]]:
        """Tokens with global expert ids -> parcels ordered by destination, bags token -> parcels, parcels per rank."""

    @abc.abstractmethod
    def send(
        self, parcels: Parcels, *, send: tuple[int, ...], local_experts: int
    ) -> tuple[Parcels, tuple[int, ...]]:
        """Parcels with local expert ids that arrived here, and how many came from each ep rank."""

    @abc.abstractmethod
    def send_back(self, parcels: torch.Tensor, *, journey: Journey) -> torch.Tensor:
        """Outputs of the received parcels -> outputs of the parcels that this rank prepared."""

    def pool(self, parcels: Parcels) -> tuple[Parcels, tuple[int, ...]]:
        """All parcels of the etp ranks that share these experts, and how many each of them brought."""
        pooled = _sizes_of(parcels.rows, axis=self._etp)
        if self._etp.size == 1:
            return parcels, pooled
        rows = gather_for_work(parcels.rows, axis=self._etp, sizes=pooled)
        weights = gather_for_work(parcels.weights, axis=self._etp, sizes=pooled)
        return Parcels(rows, all_gather(parcels.ids, axis=self._etp, sizes=pooled), weights), pooled


class AllToAllDispatcher(StagedDispatcher):
    """Uneven all-to-alls; a token travels once to each rank that holds any of its experts."""

    def prepare(self, tokens: Parcels, *, local_experts: int) -> tuple[Parcels, Bags, tuple[int, ...]]:
        """One parcel per (destination, token), ordered by destination, then by token."""
        destination = tokens.ids // local_experts
        wanted = torch.zeros(tokens.rows.shape[0], self.ep.size, dtype=torch.bool, device=tokens.ids.device)
        wanted.scatter_(1, destination, True)
        ranks, owners = wanted.T.nonzero(as_tuple=True)
        bags = bag_rows(owners, items=tokens.rows.shape[0])
        is_there = destination.index_select(0, owners) == ranks.unsqueeze(1)
        ids = (tokens.ids.index_select(0, owners) % local_experts).masked_fill(~is_there, NO_EXPERT)
        weights = spread_bags(tokens.weights, bags=bags) * is_there
        parcels = Parcels(spread_bags(tokens.rows, bags=bags), ids, weights)
        return parcels, bags, tuple(wanted.sum(0).tolist())  # host sync: sizes to send

    def send(
        self, parcels: Parcels, *, send: tuple[int, ...], local_experts: int
    ) -> tuple[Parcels, tuple[int, ...]]:
        """Counts first, then ids, then rows and weights."""
        ones = [1] * self.ep.size
        counts = torch.tensor(send, device=parcels.ids.device)
        counts = all_to_all(counts, axis=self.ep, send=ones, receive=ones, what="counts")
        receive = tuple(counts.tolist())  # host sync: sizes to receive
        ids = all_to_all(parcels.ids, axis=self.ep, send=send, receive=receive, what="ids")
        rows, weights = exchange(parcels.rows, weights=parcels.weights, axis=self.ep, send=send, receive=receive)
        return Parcels(rows, ids, weights), receive

    def send_back(self, parcels: torch.Tensor, *, journey: Journey) -> torch.Tensor:
        """The reverse all-to-all."""
        return exchange_rows(parcels, axis=self.ep, send=journey.receive, receive=journey.send)


class AllGatherDispatcher(StagedDispatcher):
    """For few ep ranks: every rank sees all tokens and keeps those of its experts. More bytes, fewer collectives."""

    def prepare(self, tokens: Parcels, *, local_experts: int) -> tuple[Parcels, Bags, tuple[int, ...]]:
        """The tokens themselves, one parcel each."""
        owners = torch.arange(tokens.rows.shape[0], device=tokens.ids.device)
        return tokens, bag_rows(owners, items=owners.numel()), ()

    def send(
        self, parcels: Parcels, *, send: tuple[int, ...], local_experts: int
    ) -> tuple[Parcels, tuple[int, ...]]:
        """All ranks' parcels; ids of other ranks' experts become NO_EXPERT."""
        sizes = _sizes_of(parcels.rows, axis=self.ep)
        rows = gather_for_work(parcels.rows, axis=self.ep, sizes=sizes)
        weights = gather_for_work(parcels.weights, axis=self.ep, sizes=sizes)
        ids = all_gather(parcels.ids, axis=self.ep, sizes=sizes) - self.ep.coordinate * local_experts
        return Parcels(rows, ids.masked_fill((ids < 0) | (ids >= local_experts), NO_EXPERT), weights), sizes

    def send_back(self, parcels: torch.Tensor, *, journey: Journey) -> torch.Tensor:
        """Sum of all ranks' outputs for this rank's tokens."""
        return reduce_scatter(parcels, axis=self.ep, sizes=journey.receive)


def arrange(parcels: Parcels, *, journey: Journey, local_experts: int) -> RemoteRows:
    """One row per choice, grouped by local expert; within an expert in order of arrival."""
    flat = parcels.ids.flatten()
    taken = (flat != NO_EXPERT).nonzero().squeeze(1)  # host sync: the number of rows
    ordered, order = torch.sort(flat.index_select(0, taken), stable=True)
    slots = taken.index_select(0, order)
    sources = slots // parcels.ids.shape[1]
    bags = bag_rows(sources, items=parcels.ids.shape[0])
    experts = torch.arange(local_experts, device=flat.device)
    return RemoteRows(
        rows=spread_bags(parcels.rows, bags=bags),
        row_weights=parcels.weights.flatten().index_select(0, slots),
        offsets=torch.searchsorted(ordered, experts, right=True),
        sources=sources,
        places=bags.members,
        bags=bags,
        journey=journey,
    )


def make_dispatcher(name: str, *, state: ParallelState, is_replicated: bool = True) -> StagedDispatcher:
    """The dispatcher that parallel.dispatcher names; `auto` is alltoall."""
    made = AllGatherDispatcher if name == "allgather" else AllToAllDispatcher
    return made(state, is_replicated=is_replicated)


def _sizes_of(rows: torch.Tensor, *, axis: Axis) -> tuple[int, ...]:
    if axis.size == 1:
        return (rows.shape[0],)
    mine = torch.tensor([rows.shape[0]], device=rows.device)
    return tuple(all_gather(mine, axis=axis, sizes=[1] * axis.size).tolist())  # host sync: uneven parts
