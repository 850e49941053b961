"""Rows of tokens to experts and back: a gather, and a sum over each token's K rows. Adjoint to each other.

Neither has a gradient of its own: the model's dispatcher knows both index lists and calls the other one backward.
"""

from __future__ import annotations

import torch

from ..dispatch import choose_backend
from ..native.library import is_narrow, native_library, pointer, runs_native, sizes, threads
from .reference import gather_rows_reference, sum_places_reference

OFFERED = ("native", "torch", "reference")


def gather_rows(x: torch.Tensor, *, sources: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """rows [R, D] = x[sources] for x [N, D] and sources [R] int64 in 0..N-1; no autograd."""
    native = runs_native(x) and sources.dtype == torch.int64
    chosen = choose_backend(backend, op="gather_rows", offered=OFFERED, device=x.device, native=native)
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
    chosen = choose_backend(backend, op="sum_places", offered=OFFERED, device=rows.device, native=native)
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
