"""What a launch needs to know of the device; under Triton's interpreter a CPU stands for a small A100."""

from __future__ import annotations

import torch

from . import interpreter  # noqa: F401  mends the interpreter where kernels are interpreted

INTERPRETED_CAPABILITY, INTERPRETED_PROCESSORS = 80, 3


def capability_of(device: torch.device) -> int:
    """Compute capability as one number: 80 for A100, 90 for H100, 100 for B200."""
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device: the programs of a persistent launch."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def power_of_two(number: int, *, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`."""
    return max(least, 1 << max(0, number - 1).bit_length())
