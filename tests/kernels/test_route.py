"""The router's product outside the C++: against the reference, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.route import Route, route
from ernie5_kernels.route.logits import router_logits, split_bits
from ernie5_kernels.testing import assert_close, outputs_and_gradients

EXACT = "gradients are summed in fp32 and rounded to bf16 once"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scores_of(hidden: torch.Tensor, weight: torch.Tensor, backend: str) -> Route:
    return route(
        hidden, weight=weight, bias=torch.zeros(len(weight)), top_k=2, keeps_scores=True, backend=backend,
    )


@pytest.mark.parametrize("tokens", (0, 1, 33))
@pytest.mark.parametrize(
    ("dtype", "tolerance", "reason"), ((torch.float32, 1e-5, "sums of fp32"), (torch.bfloat16, 8e-3, EXACT))
)
def test_logits_and_gradients_match_fp64(tokens: int, dtype: torch.dtype, tolerance: float, reason: str) -> None:
    narrow = normal(tokens, 37, dtype=dtype), normal(11, 37, seed=1, dtype=dtype)
    wide = tuple(x.double() for x in narrow)
    ours = outputs_and_gradients(lambda x, w: scores_of(x, w, "torch").logits, inputs=narrow)
    truth = outputs_and_gradients(lambda x, w: scores_of(x, w, "reference").logits, inputs=wide)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    assert_close(ours[0], expected=truth[0], tolerance=1e-5, reason="products are exact, sums of fp32")
    for actual, expected in zip(ours[1:], truth[1:], strict=True):
        assert_close(actual, expected=expected, tolerance=tolerance, reason=reason)


def test_backward_keeps_narrow_operands_alone() -> None:
    """An fp32 copy of a layer's tokens would stay with every layer."""
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
        scores_of(
            normal(33, 37, dtype=torch.bfloat16).requires_grad_(),
            normal(11, 37, seed=1, dtype=torch.bfloat16).requires_grad_(), "torch",
        )
    wide = [tuple(x.shape) for x in kept if 37 in x.shape and x.dtype != torch.bfloat16]
    assert any(37 in x.shape for x in kept)
    assert not wide, f"kept in fp32: {wide}"


def test_two_bf16_numbers_hold_sixteen_bits_of_an_fp32_one() -> None:
    x = torch.cat((normal(4096), normal(4096, seed=1) * 1e-30, normal(4096, seed=2) * 1e30))
    upper, lower = split_bits(x)
    assert upper.dtype == lower.dtype == torch.bfloat16
    assert ((upper.double() + lower.double() - x.double()).abs() <= 2.0**-16 * x.double().abs()).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_logits_on_a_gpu_are_the_cpus() -> None:
    compared = []
    for device in ("cpu", "cuda"):
        hidden = normal(333, 264, dtype=torch.bfloat16).to(device).requires_grad_()
        weight = normal(72, 264, seed=1, dtype=torch.bfloat16).to(device).requires_grad_()
        logits = router_logits(hidden, weight=weight)
        compared.append((logits, *torch.autograd.grad(logits, (hidden, weight), normal(333, 72, seed=2).to(device))))
    for ours, theirs in zip(*compared, strict=True):
        assert ours.dtype == theirs.dtype
        tolerance = 1e-5 if ours.dtype == torch.float32 else 8e-3  # a bf16 apart where sums fall beside a rounding
        torch.testing.assert_close(theirs.cpu().float(), ours.float(), rtol=tolerance, atol=1e-4)
