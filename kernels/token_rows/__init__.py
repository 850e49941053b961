"""Rows of tokens to experts and back: a gather, and a sum over each token's K rows. Adjoint to each other.

Neither has a gradient of its own: the model's dispatcher knows both index lists and calls the other one backward. By
Triton they are the kernels of `moe_permute`.
"""

from __future__ import annotations

import torch

from ..dispatch import choose_backend
from ..native.library import is_narrow, native_library, pointer, runs_native, sizes, threads
from .reference import gather_rows_reference, sum_places_reference

OFFERED = ("triton", "native", "torch", "reference")


def gather_rows(
    x: torch.Tensor, *, sources: torch.Tensor, places: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """rows [R, D] = x[sources] for x [N, D] and sources [R] int64 in 0..N-1; no autograd.

    places [N, K] int64, R = N * K: the same map from the other side, by which Triton reads every token once; without it
    auto leaves Triton out.
    """
    if places is not None and places.numel() != sources.numel():
        raise ValueError(f"gather_rows: {places.numel()} places for {sources.numel()} rows")
    native = runs_native(x) and sources.dtype == torch.int64
    offered = OFFERED if places is not None else OFFERED[1:]
    chosen = choose_backend(
        backend, op="gather_rows", offered=offered, device=x.device, dtype=x.dtype, native=native
    )
    if chosen == "triton":
        from ..moe_permute.kernel import permute_triton

        return permute_triton(x.contiguous(), places)
    if chosen == "reference":
        return gather_rows_reference(x, sources=sources)
    if chosen == "torch":
        return x.index_select(0, sources)
    x, sources = x.contiguous(), sources.contiguous()
    rows = x.new_empty(sources.shape[0], x.shape[1])
    native_library().ernie5_gather(
        *map(pointer, (x, sources, rows)), *sizes(sources.shape[0], x.shape[1] * x.element_size()), threads()
    )
    return rows


def sum_places(rows: torch.Tensor, *, places: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """out [N, D]: out[n] = sum over k of rows[places[n, k]], rows [R, D], places [N, K] int64; no autograd."""
    native = runs_native(rows) and places.dtype == torch.int64
    chosen = choose_backend(
        backend, op="sum_places", offered=OFFERED, device=rows.device, dtype=rows.dtype, native=native
    )
    if chosen == "triton":
        from ..moe_permute.kernel import unpermute_triton

        return unpermute_triton(rows.contiguous(), places, None)
    if chosen == "reference":
        return sum_places_reference(rows, places=places)
    if chosen == "torch":
        return torch.nn.functional.embedding_bag(places, rows.contiguous(), mode="sum")
    rows, places = rows.contiguous(), places.contiguous()
    out = rows.new_empty(places.shape[0], rows.shape[1])
    native_library().ernie5_sum_places(
        is_narrow(rows), *map(pointer, (rows, places, out)), *sizes(*places.shape, rows.shape[1]), threads()
    )
    return out
