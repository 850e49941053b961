"""The DeepEP adapter over a stand-in with the interface that DeepEP documents: the same parcels, sums and gradients.

No GPU runs here, so DeepEP itself does not. All numbers are small multiples of powers of two, exact in bf16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from ernie5.errors import ConfigError, KernelError
from ernie5.model.interfaces import Routing
from ernie5.model.moe.dispatch import LocalDispatcher
from ernie5.parallel.deepep import BufferNeeds, DeepEPDispatcher, SharedBuffer
from ernie5.parallel.dims import GridDims
from ernie5.parallel.state import build_state
from ernie5_kernels.token_rows import collect_rows, spread_rows

RANKS, EXPERTS, WIDTH, TOP_K = 3, 6, 4, 3
TOKENS = {"uneven": (5, 0, 3), "no token": (0, 0, 0)}
FACTORS = torch.tensor([1.0, 2.0, -1.0, 0.5, -2.0, 1.0])


@dataclasses.dataclass(frozen=True)
class Handle:
    """slots: (rank, token) of every row that arrived; tokens: of this rank."""

    slots: list[tuple[int, int]]
    tokens: int


class StandIn:
    """Dispatch and combine as DeepEP's README describes them, by gathering everything."""

    made: int = 0

    def __init__(self, needs: BufferNeeds) -> None:
        StandIn.made += 1
        self._needs, self._rank = needs, dist.get_rank()

    def dispatch(
        self, x: torch.Tensor, *, topk_idx: torch.Tensor | None = None, topk_weights: torch.Tensor | None = None,
        num_experts: int = EXPERTS, num_max_tokens_per_rank: int | None = None, handle: Handle | None = None,
    ) -> tuple:
        """Rows of all ranks that have an expert here, once each."""
        assert x.dtype == torch.bfloat16 and len(x) <= self._needs.tokens
        assert num_max_tokens_per_rank in (None, self._needs.tokens)
        everyone = self._gather((x, topk_idx, topk_weights))
        held = num_experts // RANKS
        if handle is None:
            slots = [
                (rank, token) for rank, (_, ids, _) in enumerate(everyone) for token, row in enumerate(ids.tolist())
                if any(expert // held == self._rank for expert in row)
            ]
            handle = Handle(slots, len(x))
        rows = [everyone[rank][0][token] for rank, token in handle.slots]
        out = torch.stack(rows) if rows else x.new_empty(0, WIDTH)
        if topk_idx is None:
            return out, None, None, handle, None
        ids = [everyone[rank][1][token] for rank, token in handle.slots]
        weights = [everyone[rank][2][token] for rank, token in handle.slots]
        local = torch.stack(ids) - self._rank * held if ids else topk_idx.new_empty(0, TOP_K)
        local = torch.where((local >= 0) & (local < held), local, -1)
        return out, local, torch.stack(weights) if weights else x.new_empty(0, TOP_K).float(), handle, None

    def combine(self, x: torch.Tensor, *, handle: Handle, topk_weights: torch.Tensor | None = None) -> tuple:
        """Sums per token of this rank."""
        assert x.dtype == torch.bfloat16
        sums = torch.zeros(handle.tokens, WIDTH, dtype=x.dtype)
        weights = torch.zeros(handle.tokens, TOP_K)
        for rows, slots, given in self._gather((x, handle.slots, topk_weights)):
            for index, (rank, token) in enumerate(slots):
                if rank == self._rank:
                    sums[token] += rows[index]
                    weights[token] += 0.0 if given is None else given[index]
        return sums, None if topk_weights is None else weights, None

    def _gather(self, value: tuple) -> list:
        found: list = [None] * RANKS
        dist.all_gather_object(found, value, group=self._needs.group)
        return found


def run(
    dispatcher: object, *, tokens: int, factors: torch.Tensor, create_graph: bool = False
) -> list[torch.Tensor]:
    """Output and gradients; expert e multiplies by its factor."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    orders = [torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)]
    choices = torch.stack(orders) if orders else torch.empty(0, TOP_K, dtype=torch.int64)
    hidden = torch.randint(-2, 3, (tokens, WIDTH), generator=generator).bfloat16().requires_grad_()
    weights = (torch.randint(1, 3, (tokens, TOP_K), generator=generator) / 2).requires_grad_()
    sent = dispatcher.send(hidden, routing=Routing(choices, weights, EXPERTS), num_experts=EXPERTS)
    parcels = dispatcher.receive(sent)
    arranged = dispatcher.arrange(parcels)
    lengths = torch.diff(arranged.offsets, prepend=torch.zeros(1, dtype=torch.int64))
    scale = (arranged.row_weights * factors.repeat_interleave(lengths)).unsqueeze(1)
    rows = (spread_rows(parcels.rows, plan=arranged.plan) * scale).bfloat16()
    outputs = collect_rows(rows, plan=arranged.plan)
    out = dispatcher.combine(outputs, parcels=parcels)
    (out.float() * torch.randint(-1, 3, out.shape, generator=generator)).sum().backward(create_graph=create_graph)
    return [out.detach(), hidden.grad, weights.grad]


def compare() -> int:
    """Three dispatches of two sizes equal the local dispatcher's; how many buffers were made."""
    state = build_state(GridDims(dp=RANKS, ep=RANKS), node_size=RANKS)
    dispatcher = DeepEPDispatcher(state, is_replicated=True, shared=SharedBuffer(state.ep, make=StandIn))
    held = EXPERTS // RANKS
    mine = FACTORS[dist.get_rank() * held :][:held]
    for tokens in (TOKENS["no token"], TOKENS["uneven"], TOKENS["uneven"]):
        found = run(dispatcher, tokens=tokens[dist.get_rank()], factors=mine)
        expected = run(LocalDispatcher(), tokens=tokens[dist.get_rank()], factors=FACTORS)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ConfigError, match=r"carries torch.bfloat16 rows, and hidden states are torch.float32.*bf16"):
        routing = Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), EXPERTS)
        dispatcher.send(torch.ones(1, WIDTH), routing=routing, num_experts=EXPERTS)
    with pytest.raises(KernelError, match="create_graph=True, and has no second derivative. Set parallel.ep: 1"):
        run(dispatcher, tokens=3, factors=mine, create_graph=True)
    return StandIn.made


def test_the_adapter_equals_one_process_and_makes_a_buffer_only_for_more_tokens(run_ranks: Callable) -> None:
    assert run_ranks(compare, RANKS) == [2, 2, 2]
