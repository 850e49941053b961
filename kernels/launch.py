"""What a launch needs to know of the device; under Triton's interpreter a CPU stands for a small A100."""

from __future__ import annotations

from collections.abc import Sequence

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


def chunk_table(sizes: Sequence[int], *, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each program of a launch over tensors of so many elements owns: its tensor, int32, and its chunk's first
    element, int64, on the host, whatever the program's default device."""
    counts = torch.tensor([ceil_div(size, chunk) for size in sizes], device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    starts = (torch.arange(len(owners), device="cpu") - (counts.cumsum(0) - counts)[owners]) * chunk
    return owners.int(), starts


def host_table(rows: Sequence[object], *, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A table on `device` of numbers that the host knows."""
    return to_device(torch.tensor(rows, dtype=dtype, device="cpu"), device=device)


def to_device(x: torch.Tensor, *, device: torch.device) -> torch.Tensor:
    """A copy on the device of a tensor on the host, which does not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def readable(x: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, C] itself where kernels may read it by its strides, else a copy.

    They want C contiguous and count the elements between heads in 32 bits: heads of 2^18 tokens of 128 that lie one
    after another, 64 of them, are 2^31.
    """
    return x if x.stride(3) == 1 and x.shape[2] * x.stride(2) < 1 << 31 else x.contiguous()
