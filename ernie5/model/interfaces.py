"""The seams of the model: what attention, dispatch and expert arithmetic must look like to be exchanged from outside.

The model does not know whether it is parallel, cached or quantised (DESIGN section 1.3): `parallel/` and `quantize/`
replace the objects behind these protocols, `generate/` passes a cache.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from ernie5_kernels.attention import AttentionPlan
from ernie5_kernels.token_rows import RowPlan

KeptIndices = tuple[torch.Tensor | None, ...]
"""By dim of a whole tensor the indices that a part of it has, int64 and ascending; None: all of them."""

NO_EXPERT = -1
"""In place of an expert's number: a choice that concerns another place."""


class InitialValues(Protocol):
    """What the parameters of a model start with."""

    def fill(self, part: torch.Tensor, *, name: str, shape: tuple[int, ...], kept: KeptIndices) -> None:
        """Write the part of the parameter `name`, of `shape` as a whole, that `kept` leaves of it. The same values on
        every layout, and never the whole of a large tensor in memory."""


class AttentionOp(Protocol):
    """Softmax attention; `attention` of ernie5_kernels by default. It understands the plans of its own planner."""

    def __call__(
        self, query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """query [B, T, H, C], key and value [B, S, G, C] -> [B, T, H, C]."""


class AttentionPlanner(Protocol):
    """Turns the masks of a batch into what its AttentionOp wants to know, once for all layers; `plan_attention` of
    ernie5_kernels by default."""

    def __call__(
        self, intervals: torch.Tensor | None, *, batch_rows: int, query_tokens: int, key_tokens: int
    ) -> AttentionPlan:
        """intervals [B, S, 4] over all columns; None where everything is visible."""


class LookAhead(Protocol):
    """Hands every position what stands `by` positions later in its row; `torch.roll` by default."""

    def __call__(self, x: torch.Tensor, *, by: int) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; the last `by` positions get anything of the right shape."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """A router's decision for N tokens among `num_experts`. choices [N, K] int64 global expert ids; weights [N, K] at
    least fp32, differentiable; scores [N, E] and logits [N, E] at least fp32, differentiable, for the auxiliary losses:
    they may be None where none is on.
    """

    choices: torch.Tensor
    weights: torch.Tensor
    num_experts: int
    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Parcels:
    """Tokens, each with those of its choices that concern the place where it is, or to which it travels.

    rows [M, D]; ids [M, K] int64 expert or NO_EXPERT, counted from the first expert of that place once they are there;
    weights [M, K] at least fp32, differentiable; num_experts that the place holds.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    num_experts: int


@dataclasses.dataclass(frozen=True)
class ArrangedRows:
    """One row per choice, grouped by the experts of this rank, as a plan: no row has been copied yet.

    row_weights [R]; offsets [e] int64 cumulative ends; plan: the parcel of each row, and the rows of each parcel.
    """

    row_weights: torch.Tensor
    offsets: torch.Tensor
    plan: RowPlan


class TokenDispatcher(Protocol):
    """Brings tokens to their experts and back, in stages; all differentiable, nothing dropped.

    send (prepare and send) -> receive -> arrange -> the experts -> combine (send back and combine). Parcels may be
    under way between `send` and `receive`: what does not need them can be computed there. In `arrange` and in the
    experts nothing leaves the rank, so that they can be repeated by themselves. The model only hands on what one stage
    returns to the next.
    """

    def send(self, hidden: torch.Tensor, *, routing: Routing, num_experts: int) -> object:
        """hidden [N, D] -> what is under way; num_experts over all ranks."""

    def receive(self, sent: object) -> Parcels:
        """The parcels that arrived here."""

    def arrange(self, parcels: Parcels) -> ArrangedRows:
        """One row per choice, grouped by expert."""

    def combine(self, outputs: torch.Tensor, *, parcels: Parcels) -> torch.Tensor:
        """Sums per parcel [M, D] -> sums per token [N, D] where the tokens came from."""


class ExpertCompute(Protocol):
    """The arithmetic of all local experts."""

    def __call__(self, parcels: torch.Tensor, *, arranged: ArrangedRows) -> torch.Tensor:
        """parcels [M, D] -> [M, D], the sum of what their experts make of each, times its weights."""


class RoutingPool(Protocol):
    """Makes the statistics of routing those of whole rows where a process holds a part of their tokens."""

    def loads(self, group_loads: torch.Tensor) -> torch.Tensor:
        """group_loads [6, E] fp32 of this process's tokens -> what this process reports."""

    def whole(self, routing: Routing, *, kinds: torch.Tensor) -> tuple[Routing, torch.Tensor]:
        """Routing of N = B * t tokens and their kinds [B, t] -> those of whole rows; differentiable."""


class KeyValueCache(Protocol):
    """Keys and values of the tokens seen so far, per layer."""

    def length(self, layer: int) -> int:
        """Tokens that layer `layer` holds already."""

    def extend(
        self, layer: int, *, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value [B, T, G, C] (rotated, normed) and return all of the layer's, [B, S, G, C]."""


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What every layer of one forward pass shares.

    rotation [B, T, C/2] complex; plan of the attention; kinds [B, T] int64 TokenKind (0 = padding, which counts in no
    load and no loss); active_experts [E] bool or None for all; top_k experts per token; cache or None.
    """

    rotation: torch.Tensor
    plan: AttentionPlan
    kinds: torch.Tensor
    active_experts: torch.Tensor | None
    top_k: int
    cache: KeyValueCache | None
