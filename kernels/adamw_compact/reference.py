"""AdamW whose state is small, in plain PyTorch: 8-bit moments, and bf16 weights rounded up or down at random.

A moment of 8 bits keeps, for every 256 elements, one fp32 scale, and per element the first bits of the float
1 + |x| / scale above those of 1: 4 of its exponent and 3 of its mantissa beside a sign for the first moment, 4 and 4 of
the root of the second. Steps are an 8th (16th) of a value or less down to 1 / 61,000 of a block's largest, and even
below. Codes are rounded at random in proportion: to nearest, a mean that moves by 5 % per step would never move. A
second moment above zero never falls to zero, where the division would blow up.
Sources: blocks with scales, arXiv:2110.02861; moments that must not be zero, arXiv:2309.01507; random rounding of
weights, arXiv:2010.06192. The format is our own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

import torch

from ..adamw.reference import AdamWStep

Integers = TypeVar("Integers", int, torch.Tensor)
BLOCK = 256
ONE = 0x3F800000
FIRST_SHIFT, FIRST_RANGE, FIRST_LARGEST = 20, 61439.0, 127
SECOND_SHIFT, SECOND_RANGE, SECOND_LARGEST = 19, 63487.0, 255


@dataclasses.dataclass(frozen=True)
class Moment:
    """fp32 values in the parameter's shape, scales None; or uint8 codes in that shape and fp32 scales [blocks]."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class CompactTensors:
    """What one tensor's update reads and writes. parameter: bf16, rounded at random, or fp32, perhaps with a bf16 copy;
    seed: of this tensor's random numbers, which change with the step's number."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    first: Moment
    second: Moment
    weight_decay: float
    seed: int
    copy: torch.Tensor | None = None

    def seeds(self, number: int) -> tuple[int, int]:
        """Of the weights' and of the moments' random numbers at a step."""
        base = _mixed(self.seed * 0x9E3779B1 + 2 * number & 0xFFFFFFFF)
        return base, _mixed(base ^ 0x5BD1E995)


def count_blocks(elements: int) -> int:
    """Scales that a moment of so many elements has."""
    return -(-elements // BLOCK)


@torch.no_grad()
def adamw_compact_reference(one: CompactTensors, *, step: AdamWStep, gradient_scale: torch.Tensor | None) -> None:
    """See `adamw_compact`; one tensor."""
    gradient = one.gradient.float() if gradient_scale is None else one.gradient.float() * gradient_scale
    mean = decode(one.first, shift=FIRST_SHIFT, has_sign=True)
    spread = decode(one.second, shift=SECOND_SHIFT, has_sign=False)
    spread = spread if one.second.scales is None else spread.square()
    rate, blend1, beta2, blend2, epsilon, root = step.factors
    mean = mean + (gradient - mean) * blend1
    spread = spread * beta2 + gradient.square() * blend2
    deviation = spread.double().sqrt().float()  # rounded once: PyTorch's fp32 root on the CPU is off in one of five
    weights, moments = one.seeds(step.number)
    value = one.parameter.float() * step.keep(one.weight_decay) - mean * rate / (deviation * root + epsilon)
    if one.parameter.dtype == torch.bfloat16:
        one.parameter.copy_(round_at_random(value, seed=weights))
    else:
        one.parameter.copy_(value)
    if one.copy is not None:
        one.copy.copy_(value)
    if one.first.scales is None:
        one.first.values.copy_(mean)
        one.second.values.copy_(spread)
        return
    random = hashes(mean, seed=moments)
    _encode(mean, into=one.first, random=random >> 12, shift=FIRST_SHIFT, range_=FIRST_RANGE, most=FIRST_LARGEST)
    _encode(deviation, into=one.second, random=random, shift=SECOND_SHIFT, range_=SECOND_RANGE, most=SECOND_LARGEST)
    one.second.values.clamp_(min=(deviation > 0).to(torch.uint8))


def hashes(like: torch.Tensor, *, seed: int) -> torch.Tensor:
    """A hash of 32 bits, int64, for every element of a tensor."""
    places = torch.arange(like.numel(), device=like.device).view(like.shape)
    return _mixed(seed + places & 0xFFFFFFFF)


def round_at_random(values: torch.Tensor, *, seed: int) -> torch.Tensor:
    """fp32 to bf16, up or down with the probability of where it lies between the two; NaN stays NaN."""
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    high = (bits + (hashes(values, seed=seed) & 0xFFFF) >> 16) & 0xFFFF
    rounded = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16).view(torch.bfloat16)
    return rounded.masked_fill_(values.isnan(), torch.nan)


def decode(moment: Moment, *, shift: int, has_sign: bool) -> torch.Tensor:
    """fp32 values of a moment: of the second one with codes, their roots."""
    if moment.scales is None:
        return moment.values
    code = moment.values.int()
    size = ((code & 0x7F if has_sign else code) << shift) + ONE
    value = (size.view(torch.float32) - 1.0) * _spread(moment.scales, like=code)
    return torch.where(code >= 128, -value, value) if has_sign else value


def _encode(
    values: torch.Tensor, *, into: Moment, random: torch.Tensor, shift: int, range_: float, most: int
) -> None:
    blocks = torch.nn.functional.pad(values.abs().flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    tops = blocks.amax(-1)
    into.scales.copy_(tops * (1.0 / range_))  # by products alone: a GPU divides by a constant so, and gives these bits
    inverse = torch.where(tops > 0, tops.reciprocal() * range_, 0.0)
    bits = (values.abs() * _spread(inverse, like=values) + 1.0).view(torch.int32).long() & 0xFFFFFFFF
    code = (bits - ONE + (random & (1 << shift) - 1) >> shift).clamp(max=most)
    sign = values.signbit().long() << 7 if most < 128 else 0
    into.values.copy_(code | sign)


def _spread(scales: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK)[: like.numel()].view(like.shape)


def _mixed(x: Integers) -> Integers:
    """C. Wellons' "lowbias32" hash of 32 bits, in int64 or Python's integers."""
    x = x ^ x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16
