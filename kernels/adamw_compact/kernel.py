"""AdamW with less state in Triton: a table of addresses on the device, one program per 8 blocks of whichever tensor.

Every product, sum, quotient and root is rounded by itself and in the reference's order, and nothing random depends on
how the work is cut: weights, codes and scales are the reference's bit for bit.
"""

from __future__ import annotations

import types
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..adamw.kernel import VECTOR_BYTES, addressed
from ..adamw.reference import AdamWStep
from ..launch import chunk_table, host_table, to_device
from . import reference
from .reference import CompactTensors

BLOCK = tl.constexpr(reference.BLOCK)
ONE = tl.constexpr(reference.ONE)
FIRST_SHIFT, SECOND_SHIFT = tl.constexpr(reference.FIRST_SHIFT), tl.constexpr(reference.SECOND_SHIFT)
SECOND_BELOW = tl.constexpr((1 << reference.SECOND_SHIFT) - 1)
FIRST_LARGEST, SECOND_LARGEST = tl.constexpr(reference.FIRST_LARGEST), tl.constexpr(reference.SECOND_LARGEST)
FIRST_RANGE, SECOND_RANGE = tl.constexpr(reference.FIRST_RANGE), tl.constexpr(reference.SECOND_RANGE)
COLUMNS = tl.constexpr(10)
CHUNK = 8 * reference.BLOCK
OPTIONS = types.MappingProxyType({"num_warps": 1, "enable_fp_fusion": False, "enable_reflect_ftz": False})
"""One warp: a block is 8 elements a lane, whose largest needs neither shared memory nor barrier. Without fusion a
product and a sum are rounded each by itself; without flushing the root of a second moment below 1e-38 is not zero."""


@triton.jit
def mixed(x):
    """The reference's hash of uint32."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def decoded(code, scale, SHIFT: tl.constexpr, SIGNED: tl.constexpr):
    """fp32 from a block's codes, uint32, and its scale."""
    size = code & 0x7F if SIGNED else code
    value = (((size << SHIFT) + ONE).to(tl.float32, bitcast=True) - 1.0) * scale
    if SIGNED:
        value = (value.to(tl.uint32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def top_of(sizes, inside):
    """A block's largest size, NaN of either sign where there is one: as integers, whose order is the same and whose
    maximum a warp finds by one instruction."""
    bits = sizes.to(tl.uint32, bitcast=True)
    if inside is not None:
        bits = tl.where(inside, bits, 0)
    return tl.max(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def encoded(sizes, top, random, SHIFT: tl.constexpr, RANGE: tl.constexpr, LARGEST: tl.constexpr):
    """Codes of a block's sizes, of which `top` is the largest, without a sign; random: SHIFT bits."""
    inverse = tl.where(top > 0, tl.div_rn(1.0, top) * RANGE, 0.0)
    bits = (sizes * inverse + 1.0).to(tl.uint32, bitcast=True)
    return tl.minimum((bits - ONE + random) >> SHIFT, LARGEST)


@triton.jit
def rounded(value, random):
    """fp32 to bf16, up or down at random; a NaN, whose bits would overflow, stays one."""
    high = (value.to(tl.uint32, bitcast=True) + (random & 0xFFFF)) >> 16
    return tl.where(value == value, high, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def update_block(
    parameter, gradient, first, second, first_scale, second_scale, copy, weight_places, moment_places, inside,
    keep, scale, rate, blend1, beta2, blend2, epsilon, root, CODED: tl.constexpr, COPIES: tl.constexpr,
):
    """One block, [BLOCK] pointers to its elements. Places: these plus a seed, uint32; inside: which of them exist, None
    where all do."""
    gradients = tl.load(gradient, mask=inside).to(tl.float32) * scale
    mean, spread = tl.load(first, mask=inside), tl.load(second, mask=inside)
    if CODED:
        mean = decoded(mean.to(tl.uint32), tl.load(first_scale), FIRST_SHIFT, True)
        spread = decoded(spread.to(tl.uint32), tl.load(second_scale), SECOND_SHIFT, False)
        spread *= spread
    mean += (gradients - mean) * blend1
    spread = spread * beta2 + gradients * gradients * blend2
    deviation = tl.sqrt_rn(spread)
    value = tl.load(parameter, mask=inside).to(tl.float32) * keep
    value -= tl.div_rn(mean * rate, deviation * root + epsilon)
    if parameter.dtype.element_ty == tl.bfloat16:
        tl.store(parameter, rounded(value, mixed(weight_places)), mask=inside)
    else:
        tl.store(parameter, value, mask=inside)
    if COPIES:
        tl.store(copy, value.to(tl.bfloat16), mask=inside)
    if CODED:
        bits = mean.to(tl.uint32, bitcast=True)
        size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        top1, top2 = top_of(size, inside), top_of(deviation, inside)
        tl.store(first_scale, top1 * (1.0 / FIRST_RANGE))
        tl.store(second_scale, top2 * (1.0 / SECOND_RANGE))
        random = mixed(moment_places)
        code1 = encoded(size, top1, random >> 12, FIRST_SHIFT, FIRST_RANGE, FIRST_LARGEST) | ((bits >> 24) & 0x80)
        code2 = encoded(deviation, top2, random & SECOND_BELOW, SECOND_SHIFT, SECOND_RANGE, SECOND_LARGEST)
        code2 = tl.maximum(code2, tl.minimum(deviation.to(tl.uint32, bitcast=True), 1))  # above zero never zero
        tl.store(first, code1.to(tl.uint8), mask=inside)
        tl.store(second, code2.to(tl.uint8), mask=inside)
    else:
        tl.store(first, mean, mask=inside)
        tl.store(second, spread, mask=inside)


@triton.jit
def adamw_compact_kernel(
    table, keeps, chunk_tensors, chunk_starts, scale, rate, blend1, beta2, blend2, epsilon, root,
    SCALED: tl.constexpr, CODED: tl.constexpr, COPIES: tl.constexpr, PARAMETER: tl.constexpr, GRADIENT: tl.constexpr,
    ALIGNMENT: tl.constexpr, CHUNK: tl.constexpr,
):
    """One chunk, block by block. Rows of `table`: elements, then addresses of parameter, gradient, both moments, their
    scales and the copy, then the seeds of weights and of moments.

    ALIGNMENT: bytes that divide every address of elements, which the compiler cannot know of a table; a mask would keep
    it from loading 16 bytes at once, so that whole blocks have none. Chunks start at 64 bits, offsets in them are 32.
    """
    tensor = tl.load(chunk_tensors + tl.program_id(0))
    start = tl.multiple_of(tl.load(chunk_starts + tl.program_id(0)), CHUNK)
    entry = table + tensor.to(tl.int64) * COLUMNS
    keep = tl.load(keeps + tensor)
    factor = tl.load(scale) if SCALED else 1.0
    left = tl.minimum(tl.load(entry) - start, CHUNK).to(tl.int32)
    KEPT: tl.constexpr = tl.uint8 if CODED else tl.float32
    parameter = addressed(entry + 1, PARAMETER, ALIGNMENT) + start
    gradient = addressed(entry + 2, GRADIENT, ALIGNMENT) + start
    first, second = addressed(entry + 3, KEPT, ALIGNMENT) + start, addressed(entry + 4, KEPT, ALIGNMENT) + start
    first_scales = addressed(entry + 5, tl.float32, 4) + start // BLOCK
    second_scales = addressed(entry + 6, tl.float32, 4) + start // BLOCK
    copy = addressed(entry + 7, tl.bfloat16, ALIGNMENT) + start
    weights, moments = (tl.load(entry + 8) + start).to(tl.uint32), (tl.load(entry + 9) + start).to(tl.uint32)
    lane = tl.arange(0, BLOCK)
    whole = left // BLOCK * BLOCK
    for block in range(0, whole, BLOCK):
        at = block + lane
        update_block(
            parameter + at, gradient + at, first + at, second + at, first_scales + block // BLOCK,
            second_scales + block // BLOCK, copy + at, weights + at.to(tl.uint32), moments + at.to(tl.uint32),
            None, keep, factor, rate, blend1, beta2, blend2, epsilon, root, CODED, COPIES,
        )
    if whole < left:
        at = whole + lane
        update_block(
            parameter + at, gradient + at, first + at, second + at, first_scales + whole // BLOCK,
            second_scales + whole // BLOCK, copy + at, weights + at.to(tl.uint32), moments + at.to(tl.uint32),
            at < left, keep, factor, rate, blend1, beta2, blend2, epsilon, root, CODED, COPIES,
        )


def adamw_compact_triton(
    tensors: Sequence[CompactTensors], *, step: AdamWStep, gradient_scale: torch.Tensor | None
) -> None:
    """Launch once for each kind of tensor: dtypes, codes or fp32 moments, a copy or none, whether 16 bytes divide
    every address. All tensors of an optimizer are of one kind as a rule."""
    kinds: dict[tuple[object, ...], list[CompactTensors]] = {}
    for one in tensors:
        if one.parameter.numel():
            kinds.setdefault(_kind(one), []).append(one)
    for alike in kinds.values():
        _launch(alike, step=step, gradient_scale=gradient_scale)


def _elements(one: CompactTensors) -> tuple[torch.Tensor, ...]:
    kept = (one.parameter, one.gradient, one.first.values, one.second.values)
    return kept if one.copy is None else (*kept, one.copy)


def _kind(one: CompactTensors) -> tuple[object, ...]:
    aligned = all(part.data_ptr() % VECTOR_BYTES == 0 for part in _elements(one))
    return one.parameter.dtype, one.gradient.dtype, one.first.scales is None, one.copy is None, aligned


def table_row(one: CompactTensors, *, number: int) -> tuple[int, ...]:
    """A row of the kernel's table: `number` is the step's."""
    parts = (
        one.parameter, one.gradient, one.first.values, one.second.values, one.first.scales, one.second.scales, one.copy
    )
    addresses = (0 if part is None else part.data_ptr() for part in parts)
    return one.parameter.numel(), *addresses, *one.seeds(number)


def _launch(tensors: Sequence[CompactTensors], *, step: AdamWStep, gradient_scale: torch.Tensor | None) -> None:
    first, device = tensors[0], tensors[0].parameter.device
    rows = [table_row(one, number=step.number) for one in tensors]
    owners, starts = chunk_table([row[0] for row in rows], chunk=CHUNK)
    keeps = host_table([step.keep(one.weight_decay) for one in tensors], device=device, dtype=torch.float32)
    kinds = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    adamw_compact_kernel[(len(owners),)](
        host_table(rows, device=device), keeps, to_device(owners, device=device),
        to_device(starts, device=device), keeps if gradient_scale is None else gradient_scale,
        *step.factors, gradient_scale is not None, first.first.scales is not None, first.copy is not None,
        kinds[first.parameter.dtype], kinds[first.gradient.dtype],
        VECTOR_BYTES if _kind(first)[-1] else 1, CHUNK,
        **OPTIONS,
    )
