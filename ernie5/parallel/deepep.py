"""Dispatch by DeepEP's kernels: https://github.com/deepseek-ai/DeepEP, its second version (`ElasticBuffer`).

DeepEP sends a token once to each rank, and once over each border of nodes, by itself; it hands out the same parcels as
the all-to-all dispatcher. Written to the interface that its README documents and tested against a stand-in with that
interface; no GPU has run it yet (`ernie5/parallel/README.md`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from ernie5.errors import ConfigError, LayoutError
from ernie5.model.interfaces import NO_EXPERT, Parcels
from ernie5.parallel.collectives import all_gather
from ernie5.parallel.exchange import Exchange, only_first
from ernie5.parallel.expert import Departure, Homeward, StagedDispatcher
from ernie5.parallel.state import Axis, ParallelState

ROW_DTYPE = torch.bfloat16
COMPUTE_CAPABILITY = (9, 0)


class Buffer(Protocol):
    """What is used of deep_ep.ElasticBuffer. A handle describes one dispatch; with it, the same way is gone again."""

    def dispatch(
        self,
        x: torch.Tensor,
        *,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        handle: object = None,
    ) -> tuple:
        """(rows, ids counted from the rank's first expert or -1, weights, handle, event)."""

    def combine(self, x: torch.Tensor, *, handle: object, topk_weights: torch.Tensor | None = None) -> tuple:
        """(sums per token where the tokens came from, weights likewise, event)."""


@dataclasses.dataclass(frozen=True)
class BufferNeeds:
    """What a buffer is made for: the group of ep ranks, tokens of the fullest rank, width D, choices K, experts E."""

    group: dist.ProcessGroup
    tokens: int
    width: int
    top_k: int
    num_experts: int


def require_deepep() -> None:
    """Raise LayoutError naming everything that DeepEP misses here."""
    missing = []
    if importlib.util.find_spec("deep_ep") is None:
        missing.append("the package deep_ep is not installed")
    if not torch.cuda.is_available():
        missing.append("there is no CUDA device")
    elif torch.cuda.get_device_capability() < COMPUTE_CAPABILITY:
        missing.append(f"the GPU's compute capability is {torch.cuda.get_device_capability()}, below (9, 0)")
    if missing:
        raise LayoutError(
            f"parallel.dispatcher = deepep cannot run here: {'; '.join(missing)}. Set parallel.dispatcher: alltoall, "
            "or hierarchical where ep spans several nodes"
        )


def make_buffer(needs: BufferNeeds) -> Buffer:
    """DeepEP's own buffer; it lives as long as the dispatchers that share it."""
    from deep_ep import ElasticBuffer

    return ElasticBuffer(
        needs.group, num_max_tokens_per_rank=needs.tokens, hidden=needs.width, num_topk=needs.top_k
    )


class SharedBuffer:
    """One buffer for all layers, made anew when a rank brings more tokens than ever before."""

    def __init__(self, axis: Axis, *, make: Callable[[BufferNeeds], Buffer]) -> None:
        self._axis, self._make = axis, make
        self._needs: BufferNeeds | None = None
        self._buffer: Buffer | None = None

    def fitting(self, parcels: Parcels) -> tuple[Buffer, int]:
        """The buffer, and the tokens of the fullest rank that it takes; collective."""
        mine = torch.tensor([parcels.rows.shape[0]], device=parcels.rows.device)
        most = int(all_gather(mine, axis=self._axis, sizes=[1] * self._axis.size).max())  # host sync: size of a buffer
        if self._needs is None or most > self._needs.tokens:
            width, top_k = parcels.rows.shape[1], parcels.ids.shape[1]
            self._needs = BufferNeeds(self._axis.group, max(most, 1), width, top_k, parcels.num_experts)
            self._buffer = self._make(self._needs)
        return self._buffer, self._needs.tokens


@dataclasses.dataclass
class Trip:
    """One dispatch: filled in forward, and what both ways back need."""

    buffer: Buffer
    tokens: int
    num_experts: int
    ids: torch.Tensor | None = None
    handle: object = None


class DeepEPDispatcher(StagedDispatcher):
    """Parcels over the ep axis by DeepEP."""

    def __init__(self, state: ParallelState, *, is_replicated: bool, shared: SharedBuffer) -> None:
        super().__init__(state, is_replicated=is_replicated)
        self._shared = shared

    def depart(self, parcels: Parcels) -> Departure:
        """One dispatch; the ids that arrive are made global again."""
        if parcels.rows.dtype != ROW_DTYPE:
            raise ConfigError(
                f"parallel.dispatcher = deepep carries {ROW_DTYPE} rows, and hidden states are {parcels.rows.dtype}. "
                "Set engine.precision: bf16, or parallel.dispatcher: alltoall"
            )
        buffer, tokens = self._shared.fitting(parcels)
        trip = Trip(buffer, tokens, parcels.num_experts)
        rows, weights = _Dispatch.apply(parcels.rows, parcels.weights.float(), parcels.ids, trip)
        first = self.ep.coordinate * (parcels.num_experts // self.ep.size)
        ids = torch.where(trip.ids == NO_EXPERT, NO_EXPERT, trip.ids.long() + first)
        return Departure(ids, Exchange((rows, weights)), trip, parcels.num_experts)

    def arrive(self, departure: Departure) -> tuple[Parcels, tuple[Trip, ...]]:
        """They are here."""
        rows, weights = departure.exchange.wait()
        return Parcels(rows, departure.ids, weights, departure.num_experts), (departure.leg,)

    def send_back(self, outputs: torch.Tensor, *, legs: Sequence[Trip]) -> Homeward:
        """One combine, which adds up the outputs of a token."""
        return Homeward(Exchange((_Combine.apply(outputs, legs[0]),)), plan=None)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, ids, trip):
        ctx.trip = trip
        out, trip.ids, out_weights, trip.handle, _ = trip.buffer.dispatch(
            rows.contiguous(), topk_idx=ids, topk_weights=weights.contiguous(), num_experts=trip.num_experts,
            num_max_tokens_per_rank=trip.tokens,
        )
        return out, out_weights

    @staticmethod
    @only_first
    def backward(ctx, grad_rows, grad_weights):
        trip = ctx.trip
        rows, weights, _ = trip.buffer.combine(
            grad_rows.contiguous(), handle=trip.handle, topk_weights=grad_weights.contiguous()
        )
        return rows, weights, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, trip):
        ctx.trip = trip
        return trip.buffer.combine(rows.contiguous(), handle=trip.handle)[0]

    @staticmethod
    @only_first
    def backward(ctx, grad):
        return ctx.trip.buffer.dispatch(grad.contiguous(), handle=ctx.trip.handle)[0], None
