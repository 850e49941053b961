"""Expert parallelism: tokens travel to the ranks that hold their experts, and their weighted outputs travel back.

Five stages: prepare, send, arrange (and the experts), send_back, combine; what differs by transport is
`announce`, `depart`, `arrive` and `send_back`. A token goes once to each rank that holds any of its chosen experts,
however many those are; there the rows are multiplied out to one per choice, and the weighted outputs of one token are
summed before they go back. Nothing is dropped or padded; a rank whose experts get no token takes part with zero rows.

With etp > 1 each of the ranks that share an expert holds some columns of it: they pool the parcels that arrived, and
before `send_back` their partial outputs are summed and parted again.
"""

from __future__ import annotations

import abc
import dataclasses

import torch

from ernie5.model.interfaces import NO_EXPERT, ArrangedRows, Parcels, Routing
from ernie5.parallel.collectives import (
    all_gather,
    all_to_all,
    even_sizes,
    exchange_rows,
    gather,
    gather_for_work,
    own_part,
    reduce_scatter,
    split,
)
from ernie5.parallel.exchange import Exchange, start_exchange
from ernie5.parallel.parcels import Leg, RemoteParcels, address, keep_local
from ernie5.parallel.routes import RouteTable
from ernie5.parallel.state import Axis, ParallelState
from ernie5_kernels.token_rows import RowPlan, collect_rows, plan_rows


@dataclasses.dataclass(frozen=True)
class Departure:
    """Parcels that have left: their ids are here already, rows and weights when `exchange` is waited for."""

    ids: torch.Tensor
    exchange: Exchange
    leg: Leg
    num_experts: int


@dataclasses.dataclass(frozen=True)
class Announced:
    """Parcels whose receivers know of them: `parcels` will leave, `ids` have come here."""

    parcels: Parcels
    ids: torch.Tensor
    leg: Leg


@dataclasses.dataclass(frozen=True)
class Ready:
    """What `prepare` hands to `ship`. announced: by a transport to itself; tokens: per tp rank, together N."""

    announced: object
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class UnderWay:
    """What `send` hands to `receive`. tokens: per tp rank, together N."""

    departure: Departure
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Homeward:
    """Outputs on their way back; plan: the parcels of each token, still to be summed (None: they are)."""

    exchange: Exchange
    plan: RowPlan | None


class StagedDispatcher(abc.ABC):
    """TokenDispatcher over ep and etp.

    Tokens that tp ranks hold in common (`is_replicated`) are first shared out among them: in the expert grid every
    rank brings tokens of its own.
    """

    def __init__(self, state: ParallelState, *, is_replicated: bool = True) -> None:
        self.ep, self._etp, self._tp = state.ep, state.etp, state.tp
        self._shares = is_replicated and state.tp.size > 1

    def send(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> UnderWay:
        """hidden [N, D] of this rank -> parcels on their way to the ranks of their experts."""
        return self.ship(self.prepare(hidden, routing=routing, num_experts=num_experts))

    def prepare(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> Ready:
        """The parcels of hidden [N, D]; their receivers know how many will come."""
        tokens = even_sizes(hidden.shape[0], axis=self._tp) if self._shares else [hidden.shape[0]]
        choices, weights = routing.choices, routing.weights
        if self._shares:
            hidden = split(hidden, axis=self._tp, sizes=tokens)
            weights = split(weights, axis=self._tp, sizes=tokens)
            choices = own_part(choices, axis=self._tp, sizes=tokens)
        return Ready(self.announce(Parcels(hidden, choices, weights, num_experts)), tuple(tokens))

    def ship(self, ready: Ready) -> UnderWay:
        """Let the parcels leave."""
        return UnderWay(self.depart(ready.announced), ready.tokens)

    def receive(self, sent: UnderWay) -> RemoteParcels:
        """The parcels for this rank's experts, from all ranks of the block; ids count from its first expert."""
        local_experts = sent.departure.num_experts // self.ep.size
        parcels, legs = self.arrive(sent.departure)
        parcels = keep_local(parcels, first=self.ep.coordinate * local_experts, local_experts=local_experts)
        parcels, pooled = self.pool(parcels)
        return RemoteParcels(**vars(parcels), legs=legs, pooled=pooled, tokens=sent.tokens)

    def arrange(self, parcels: Parcels) -> ArrangedRows:
        """One row per choice, grouped by local expert; within an expert in order of arrival."""
        flat = parcels.ids.flatten()
        taken = (flat != NO_EXPERT).nonzero().squeeze(1)  # host sync: the number of rows
        ordered, order = torch.sort(flat.index_select(0, taken), stable=True)
        slots = taken.index_select(0, order)
        experts = torch.arange(parcels.num_experts, device=flat.device)
        return ArrangedRows(
            row_weights=parcels.weights.flatten().index_select(0, slots),
            offsets=torch.searchsorted(ordered, experts, right=True),
            plan=plan_rows(slots // parcels.ids.shape[1], tokens=parcels.ids.shape[0]),
        )

    def combine(self, outputs: torch.Tensor, *, parcels: RemoteParcels) -> torch.Tensor:
        """Sums per parcel [M, D] -> sums per token [N, D] of this rank."""
        return self.come_home(self.go_home(outputs, parcels=parcels), parcels=parcels)

    def go_home(self, outputs: torch.Tensor, *, parcels: RemoteParcels) -> Homeward:
        """Let sums per parcel [M, D] leave for where the tokens came from."""
        outputs = reduce_scatter(outputs, axis=self._etp, sizes=parcels.pooled)
        return self.send_back(outputs, legs=parcels.legs)

    def come_home(self, back: Homeward, *, parcels: RemoteParcels) -> torch.Tensor:
        """Sums per token [N, D] of this rank."""
        (out,) = back.exchange.wait()
        out = out if back.plan is None else collect_rows(out, plan=back.plan)
        return gather(out, axis=self._tp, sizes=parcels.tokens) if self._shares else out

    def announce(self, parcels: Parcels) -> object:
        """This rank's tokens, with global ids, as `depart` takes them; a transport may tell the receivers."""
        return parcels

    @abc.abstractmethod
    def depart(self, announced: object) -> Departure:
        """What `announce` returned, sent on the first leg of its way."""

    @abc.abstractmethod
    def arrive(self, departure: Departure) -> tuple[Parcels, tuple[Leg, ...]]:
        """The parcels, with global ids, that have reached this rank at the end of the last leg, and all legs."""

    @abc.abstractmethod
    def send_back(self, outputs: torch.Tensor, *, legs: tuple[Leg, ...]) -> Homeward:
        """Outputs of the parcels that arrived -> sums per token that this rank sent, or what they will be made of."""

    def pool(self, parcels: Parcels) -> tuple[Parcels, tuple[int, ...]]:
        """All parcels of the etp ranks that share these experts, and how many each of them brought."""
        pooled = _sizes_of(parcels.rows, axis=self._etp)
        if self._etp.size == 1:
            return parcels, pooled
        rows = gather_for_work(parcels.rows, axis=self._etp, sizes=pooled)
        weights = gather_for_work(parcels.weights, axis=self._etp, sizes=pooled)
        ids = all_gather(parcels.ids, axis=self._etp, sizes=pooled)
        return Parcels(rows, ids, weights, parcels.num_experts), pooled


class AllToAllDispatcher(StagedDispatcher):
    """Uneven all-to-alls, one per leg. `routes`: where a leg takes the choices of an expert; the last to its holder.

    One leg: a token travels once to each rank that holds any of its experts. Two legs (`hierarchical`): it crosses once
    to each node that holds any, to one rank there, which hands it out within the node; on the way back that rank adds
    up what its node computed for the token, and one row crosses.
    """

    def __init__(
        self, state: ParallelState, *, is_replicated: bool, routes: tuple[RouteTable, ...], overlaps: bool
    ) -> None:
        super().__init__(state, is_replicated=is_replicated)
        self._routes, self._overlaps = routes, overlaps

    def announce(self, parcels: Parcels) -> Announced:
        """Parcels of the first leg."""
        return self._announce(parcels, route=self._routes[0])

    def depart(self, announced: Announced) -> Departure:
        """Start the first leg; with `overlaps` rows and weights are still travelling when this returns."""
        return self._start(announced, is_async=self._overlaps)

    def arrive(self, departure: Departure) -> tuple[Parcels, tuple[Leg, ...]]:
        """Wait for the first leg and travel the others."""
        parcels, legs = _finish(departure), [departure.leg]
        for route in self._routes[1:]:
            departure = self._start(self._announce(parcels, route=route), is_async=False)
            parcels = _finish(departure)
            legs.append(departure.leg)
        return parcels, tuple(legs)

    def send_back(self, outputs: torch.Tensor, *, legs: tuple[Leg, ...]) -> Homeward:
        """The reverse all-to-alls, the last leg first, each followed by the sum over a token's parcels; with `overlaps`
        the first leg's rows are still travelling when this returns."""
        for leg in reversed(legs[1:]):
            outputs = exchange_rows(outputs, axis=self.ep, send=leg.receive, receive=leg.send)
            outputs = collect_rows(outputs, plan=leg.plan)
        first = legs[0]
        exchange = start_exchange(
            outputs, axis=self.ep, send=first.receive, receive=first.send, is_async=self._overlaps
        )
        return Homeward(exchange, first.plan)

    def _announce(self, parcels: Parcels, *, route: RouteTable) -> Announced:
        """Counts first, then ids."""
        destination_of = route.destinations(parcels.num_experts, device=parcels.ids.device)
        made, plan, send = address(parcels, destination_of=destination_of, ranks=self.ep.size)
        ones = [1] * self.ep.size
        counts = torch.tensor(send, device=made.ids.device)
        counts = all_to_all(counts, axis=self.ep, send=ones, receive=ones, what="counts")
        receive = tuple(counts.tolist())  # host sync: sizes to receive
        ids = all_to_all(made.ids, axis=self.ep, send=send, receive=receive, what="ids")
        return Announced(made, ids, Leg(plan, send, receive))

    def _start(self, announced: Announced, *, is_async: bool) -> Departure:
        """Then rows and weights."""
        made, leg = announced.parcels, announced.leg
        exchange = start_exchange(
            made.rows, weights=made.weights, axis=self.ep, send=leg.send, receive=leg.receive, is_async=is_async
        )
        return Departure(announced.ids, exchange, leg, made.num_experts)


class AllGatherDispatcher(StagedDispatcher):
    """For few ep ranks: every rank sees all tokens and keeps those of its experts. More bytes, fewer collectives."""

    def depart(self, parcels: Parcels) -> Departure:
        """The tokens themselves, one parcel each, to everyone."""
        owners = torch.arange(parcels.rows.shape[0], device=parcels.ids.device)
        sizes = _sizes_of(parcels.rows, axis=self.ep)
        rows = gather_for_work(parcels.rows, axis=self.ep, sizes=sizes)
        weights = gather_for_work(parcels.weights, axis=self.ep, sizes=sizes)
        ids = all_gather(parcels.ids, axis=self.ep, sizes=sizes)
        leg = Leg(plan_rows(owners, tokens=owners.numel()), sizes, sizes)
        return Departure(ids, Exchange((rows, weights)), leg, parcels.num_experts)

    def arrive(self, departure: Departure) -> tuple[Parcels, tuple[Leg, ...]]:
        """All ranks' parcels."""
        return _finish(departure), (departure.leg,)

    def send_back(self, outputs: torch.Tensor, *, legs: tuple[Leg, ...]) -> Homeward:
        """Sum of all ranks' outputs for this rank's tokens."""
        return Homeward(Exchange((reduce_scatter(outputs, axis=self.ep, sizes=legs[0].receive),)), plan=None)


def _finish(departure: Departure) -> Parcels:
    rows, weights = departure.exchange.wait()
    return Parcels(rows, departure.ids, weights, departure.num_experts)


def _sizes_of(rows: torch.Tensor, *, axis: Axis) -> tuple[int, ...]:
    if axis.size == 1:
        return (rows.shape[0],)
    mine = torch.tensor([rows.shape[0]], device=rows.device)
    return tuple(all_gather(mine, axis=axis, sizes=[1] * axis.size).tolist())  # host sync: uneven parts
