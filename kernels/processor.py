"""What a device's processor does by itself, which decides the arithmetic that is worth asking for."""

from __future__ import annotations

import functools

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are as fast there as fp32 ones at least: any GPU, and CPUs with instructions for them
    (AVX-512 bf16, AMX, Arm's bf16). PyTorch multiplies element by element on the others: with AVX2 at 1/60 of its rate
    in fp32. The C++ kernels widen bf16 to fp32 there, and lose nothing."""
    return device.type != "cpu" or _cpu_multiplies_bf16()


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    return any(present for name, present in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
