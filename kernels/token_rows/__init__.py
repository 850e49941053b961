"""Rows of tokens to experts and back: a gather, and a sum over each token's K rows. Adjoint to each other.

Neither has a gradient of its own: the model's dispatcher knows both index lists and calls the other one backward. By
Triton they are the kernels of `moe_permute`.
"""

from __future__ import annotations

import torch

from ..checks import require, require_beside, require_within
from ..dispatch import choose_backend
from ..native.library import is_narrow, native_library, pointer, runs_native, sizes, threads
from .reference import gather_rows_reference, sum_places_reference

OFFERED = ("triton", "native", "torch", "reference")


def gather_rows(
    x: torch.Tensor, *, sources: torch.Tensor, places: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """rows [R, D] = x[sources] for x [N, D] and sources [R] int64 in 0..N-1; no autograd.

    places [N, K] int64, R = N * K: the same map from the other side, by which Triton reads every token once; without it
    auto leaves Triton out. Raises KernelError for a backend that cannot run, ValueError for tensors that do not fit.
    """
    op = "gather_rows"
    require(x.ndim == 2, op=op, name="x", tensor=x, rule="it must be [tokens, width]")
    _require_no_gradient(x, op=op, name="x")
    require(sources.ndim == 1, op=op, name="sources", tensor=sources, rule="it must be [rows]")
    _require_index(sources, limit=x.shape[0], beside=x, op=op, name="sources")
    if places is not None:
        holds = places.ndim == 2 and places.shape[0] == x.shape[0] and places.numel() == sources.numel()
        rule = f"it must be [tokens of x, k], one per each of the {sources.numel()} sources"
        require(holds, op=op, name="places", tensor=places, rule=rule)
        require(places.dtype == torch.int64, op=op, name="places", tensor=places, rule="it must be int64")
        require_beside(places, first=x, op=op, name="places")
    native = runs_native(x)
    offered = OFFERED if places is not None else OFFERED[1:]
    chosen = choose_backend(
        backend, op=op, offered=offered, device=x.device, dtype=x.dtype, native=native
    )
    if chosen == "triton":
        from ..moe_permute.kernel import permute_triton

        require_within(places, limit=sources.shape[0], op=op, name="places")
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
    """out [N, D]: out[n] = sum over k of rows[places[n, k]], rows [R, D], places [N, K] int64; no autograd.

    Raises KernelError for a backend that cannot run, ValueError for tensors that do not fit.
    """
    op = "sum_places"
    require(rows.ndim == 2, op=op, name="rows", tensor=rows, rule="it must be [rows, width]")
    _require_no_gradient(rows, op=op, name="rows")
    holds = places.ndim == 2 and places.shape[1] > 0
    require(holds, op=op, name="places", tensor=places, rule="it must be [tokens, k] with a k of at least 1")
    _require_index(places, limit=rows.shape[0], beside=rows, op=op, name="places")
    native = runs_native(rows)
    chosen = choose_backend(
        backend, op=op, offered=OFFERED, device=rows.device, dtype=rows.dtype, native=native
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


def _require_index(index: torch.Tensor, *, limit: int, beside: torch.Tensor, op: str, name: str) -> None:
    require(index.dtype == torch.int64, op=op, name=name, tensor=index, rule="it must be int64")
    require_beside(index, first=beside, op=op, name=name)
    require_within(index, limit=limit, op=op, name=name)


def _require_no_gradient(tensor: torch.Tensor, *, op: str, name: str) -> None:
    holds = not (tensor.requires_grad and torch.is_grad_enabled())
    rule = "it wants a gradient, which this op has not; call it in a torch.autograd.Function, or detach the tensor"
    require(holds, op=op, name=name, tensor=tensor, rule=rule)
