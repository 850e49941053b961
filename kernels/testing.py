"""Helpers of the kernels' tests: closeness with a stated reason, gradients side by side, poisoned memory, sizes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch

ODD_SIZES = (1, 2, 7, 63, 129)


def assert_close(actual: torch.Tensor, *, expected: torch.Tensor, tolerance: float, reason: str) -> None:
    """Fail unless max|actual - expected| <= tolerance * max|expected|, NaN counting as failure.

    Where all that is expected is zero, what cancels there is unknown and taken for one.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    difference = (actual.double() - expected.double()).abs().max().item()
    limit = tolerance * (expected.double().abs().max().item() or 1.0)
    if not difference <= limit:
        raise AssertionError(f"largest difference {difference:.3e} exceeds {limit:.3e} ({reason})")


def outputs_and_gradients(
    function: Callable[..., torch.Tensor], *, inputs: tuple[torch.Tensor, ...], seed: int = 0
) -> list[torch.Tensor]:
    """Return [output, gradient of every input] of `function(*inputs)` under a random upstream gradient."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype).to(output.device)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN inside the block, so that reading one shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before)


def kernel_device() -> torch.device:
    """Where Triton kernels are tested: the GPU, or the CPU under TRITON_INTERPRET=1."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers on the kernels' device, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(kernel_device())


def assert_backends_agree(
    function: Callable[..., torch.Tensor],
    *,
    inputs: tuple[torch.Tensor, ...],
    tolerance: float,
    reason: str,
    backends: tuple[str, str] = ("triton", "reference"),
) -> None:
    """Compare output and gradients of `function(*inputs, backend)`, with uninitialised memory full of NaN."""
    with poisoned_memory():
        actual, expected = (
            outputs_and_gradients(lambda *x, b=b: function(*x, b), inputs=inputs) for b in backends
        )
    for position, (one, other) in enumerate(zip(actual, expected, strict=True)):
        name = "output" if position == 0 else f"gradient of input {position - 1}"
        assert_close(one, expected=other, tolerance=tolerance, reason=f"{name}; {reason}")
