"""AdamW in Triton: a table of addresses on the device, one program per 2,048 elements of whichever tensor.

The table is made on the host and copied without waiting, since gradients may move from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..launch import chunk_table, host_table, to_device
from .reference import AdamWStep, AdamWTensors

CHUNK = 2048
VECTOR_BYTES = 16
WARPS = 8


@triton.jit
def addressed(place, KIND: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The pointer to KIND that stands at `place`."""
    return tl.multiple_of(tl.load(place).to(tl.pointer_type(KIND)), ALIGNMENT)


@triton.jit
def update_chunk(
    entry, index, inside, keep, scale, rate, blend1, beta2, blend2, epsilon, root,
    COPIES: tl.constexpr, GRADIENT: tl.constexpr, ALIGNMENT: tl.constexpr,
):
    """The elements `index` of the tensor that `entry` describes; inside: None where all of them exist."""
    parameter = addressed(entry + 1, tl.float32, ALIGNMENT) + index
    first = addressed(entry + 3, tl.float32, ALIGNMENT) + index
    second = addressed(entry + 4, tl.float32, ALIGNMENT) + index
    gradient = tl.load(addressed(entry + 2, GRADIENT, ALIGNMENT) + index, mask=inside).to(tl.float32) * scale
    mean = tl.load(first, mask=inside)
    mean += (gradient - mean) * blend1
    spread = beta2 * tl.load(second, mask=inside) + blend2 * gradient * gradient
    value = tl.load(parameter, mask=inside) * keep
    value -= rate * mean / (tl.sqrt(spread) * root + epsilon)
    tl.store(first, mean, mask=inside)
    tl.store(second, spread, mask=inside)
    tl.store(parameter, value, mask=inside)
    if COPIES:
        tl.store(addressed(entry + 5, tl.bfloat16, ALIGNMENT) + index, value.to(tl.bfloat16), mask=inside)


@triton.jit
def adamw_kernel(
    table, keeps, chunk_tensors, chunk_starts, scale, rate, blend1, beta2, blend2, epsilon, root,
    SCALED: tl.constexpr, COPIES: tl.constexpr, GRADIENT: tl.constexpr, ALIGNMENT: tl.constexpr, CHUNK: tl.constexpr,
):
    """One chunk. Rows of `table`: elements, then addresses of parameter, gradient, both moments and the copy.

    ALIGNMENT: bytes that divide every address, which the compiler cannot know of a table; a mask would keep it from
    loading 16 bytes at once, so that whole chunks have none.
    """
    tensor = tl.load(chunk_tensors + tl.program_id(0))
    entry = table + tensor.to(tl.int64) * 6
    start = tl.multiple_of(tl.load(chunk_starts + tl.program_id(0)), CHUNK)
    index = start + tl.arange(0, CHUNK)
    size = tl.load(entry)
    keep = tl.load(keeps + tensor)
    factor = tl.load(scale) if SCALED else 1.0
    if start + CHUNK <= size:
        update_chunk(entry, index, None, keep, factor, rate, blend1, beta2, blend2, epsilon, root,
                     COPIES, GRADIENT, ALIGNMENT)
    else:
        update_chunk(entry, index, index < size, keep, factor, rate, blend1, beta2, blend2, epsilon, root,
                     COPIES, GRADIENT, ALIGNMENT)


def adamw_triton(
    tensors: Sequence[AdamWTensors], *, step: AdamWStep, gradient_scale: torch.Tensor | None
) -> None:
    """Launch once for each kind of tensor: the gradient's dtype, a copy or none, whether 16 bytes divide every
    address; so that one tensor that lies askew costs no other its wide loads."""
    kinds: dict[tuple[object, ...], list[AdamWTensors]] = {}
    for one in tensors:
        if one.parameter.numel():
            kinds.setdefault(_kind(one), []).append(one)
    for alike in kinds.values():
        _launch(alike, step=step, gradient_scale=gradient_scale)


def _kind(one: AdamWTensors) -> tuple[torch.dtype, bool, bool]:
    aligned = all(address % VECTOR_BYTES == 0 for address in _addresses(one))
    return one.gradient.dtype, one.copy is not None, aligned


def _addresses(one: AdamWTensors) -> tuple[int, ...]:
    """As in a row of the table; 0 for no copy."""
    parts = (one.parameter, one.gradient, one.first_moment, one.second_moment, one.copy)
    return tuple(0 if part is None else part.data_ptr() for part in parts)


def _launch(tensors: Sequence[AdamWTensors], *, step: AdamWStep, gradient_scale: torch.Tensor | None) -> None:
    device = tensors[0].parameter.device
    dtype, copies, aligned = _kind(tensors[0])
    rows = [(one.parameter.numel(), *_addresses(one)) for one in tensors]
    owners, starts = chunk_table([row[0] for row in rows], chunk=CHUNK)
    keeps = host_table([step.keep(one.weight_decay) for one in tensors], device=device, dtype=torch.float32)
    adamw_kernel[(len(owners),)](
        host_table(rows, device=device), keeps, to_device(owners, device=device), to_device(starts, device=device),
        keeps if gradient_scale is None else gradient_scale,
        *step.factors, gradient_scale is not None, copies, tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        VECTOR_BYTES if aligned else 1, CHUNK,
        num_warps=WARPS,
    )
