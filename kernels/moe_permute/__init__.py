"""Tokens into the order of their experts and back, without a sort and without a word from the host."""

from __future__ import annotations

import dataclasses

import torch

from ..checks import (
    fp8_runs_on,
    require,
    require_beside,
    require_float,
    require_fractions,
    require_shape,
    require_within,
)
from ..dispatch import choose_backend
from ..quant_cast import ScaledTensor, quant_cast
from .reference import permute_reference, plan_reference, unpermute_reference

OFFERED = ("triton", "torch", "reference")
OP = "moe_permute"


@dataclasses.dataclass(frozen=True)
class Permutation:
    """offsets [E] int64, ends of the experts' rows; sources [N*K] int64, the token of a row; places [N, K] int64."""

    offsets: torch.Tensor
    sources: torch.Tensor
    places: torch.Tensor


def plan_permutation(choices: torch.Tensor, *, num_experts: int, backend: str = "auto") -> Permutation:
    """Order the slots of choices [N, K] (int64 in 0..E-1) by expert; within an expert the order of tokens stays.

    Raises KernelError for a backend that cannot run, ValueError for choices that do not fit. On a GPU their range is
    not looked at, which would wait for it: a choice outside leaves its place as memory was, and `permute` follows it.
    """
    holds = choices.ndim == 2 and choices.dtype == torch.int64
    require(holds, op=OP, name="choices", tensor=choices, rule="it must be [tokens, k] of int64")
    if num_experts < 1:
        raise ValueError(f"moe_permute: num_experts is {num_experts}; it must be at least 1")
    require_within(choices, limit=num_experts, op=OP, name="choices")
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=choices.device)
    if chosen == "triton":
        from .kernel import plan_triton

        return Permutation(*plan_triton(choices, num_experts))
    if chosen == "torch":
        return _plan_by_sorting(choices, num_experts=num_experts)
    return Permutation(*plan_reference(choices, num_experts=num_experts))


def _plan_by_sorting(choices: torch.Tensor, *, num_experts: int) -> Permutation:
    ordered, order = torch.sort(choices.flatten(), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    experts = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(ordered, experts, right=True)
    return Permutation(offsets, order // choices.shape[1], places.view(choices.shape))


def permute(x: torch.Tensor, *, permutation: Permutation, backend: str = "auto") -> torch.Tensor:
    """Return rows [N*K, D] in expert order of x [N, D]; its gradient is `unpermute` without weights."""
    _require_tokens(x, permutation=permutation)
    if choose_backend(backend, op=OP, offered=OFFERED, device=x.device, dtype=x.dtype) == "triton":
        from .kernel import permute_triton

        require_float(x, op=OP, name="x")
        return permute_triton(x, permutation.places)
    return permute_reference(x, sources=permutation.sources)


def permute_cast(x: torch.Tensor, *, permutation: Permutation, backend: str = "auto") -> ScaledTensor:
    """Rows in expert order as e4m3 with scales of 1 x 128, cast and spread in one pass; no gradient."""
    _require_tokens(x, permutation=permutation)
    require(x.shape[1] > 0, op=OP, name="x", tensor=x, rule="a cast needs a width of at least 1")
    require_fractions(x, op=OP, name="x")
    offered = OFFERED if fp8_runs_on(x.device) else OFFERED[1:]
    if choose_backend(backend, op=OP, offered=offered, device=x.device, dtype=x.dtype) == "triton":
        from ..quant_cast.kernel import spread_cast_triton

        require_float(x, op=OP, name="x")
        return ScaledTensor(*spread_cast_triton(x.detach(), permutation.places), 1)
    return quant_cast(permute_reference(x, sources=permutation.sources), block_rows=1, backend="reference")


def unpermute(
    rows: torch.Tensor, *, permutation: Permutation, weights: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Return out [N, D] = sum_k weights[n, k] rows[places[n, k]], summed in at least fp32; weights None means ones.

    rows [N*K, D]; weights [N, K]. Gradients of both. Raises KernelError or ValueError as the other operators do.
    """
    places = permutation.places
    holds = rows.ndim == 2 and rows.shape[0] == places.numel()
    require(holds, op=OP, name="rows", tensor=rows, rule=f"it must be [{places.numel()}, width], one row per slot")
    require_beside(places, first=rows, op=OP, name="permutation.places")
    if weights is not None:
        require_shape(weights, shape=places.shape, op=OP, name="weights", meaning="one per slot")
        require_fractions(weights, op=OP, name="weights")
        require_beside(weights, first=rows, op=OP, name="weights")
    if choose_backend(backend, op=OP, offered=OFFERED, device=rows.device, dtype=rows.dtype) == "triton":
        from .kernel import unpermute_triton

        require_float(rows, op=OP, name="rows")
        return unpermute_triton(rows, places, weights)
    return unpermute_reference(rows, places=places, weights=weights)


def _require_tokens(x: torch.Tensor, *, permutation: Permutation) -> None:
    tokens = permutation.places.shape[0]
    holds = x.ndim == 2 and x.shape[0] == tokens
    require(holds, op=OP, name="x", tensor=x, rule=f"it must be [{tokens}, width], one row per token")
    require_beside(permutation.sources, first=x, op=OP, name="permutation.sources")
