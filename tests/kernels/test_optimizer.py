"""The optimizer's C++ kernels against their plain forms: odd sizes, both gradient dtypes, any number of threads."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.adamw import AdamWStep, AdamWTensors, adamw
from ernie5_kernels.native.library import native_library
from ernie5_kernels.sum_squares import sum_squares
from ernie5_kernels.testing import assert_close

SIZES = ((1,), (0,), (7, 3), (16,), (16_384,), (16_385,), (3, 40_000))

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors_of(*, gradient: torch.dtype, copies: bool) -> list[AdamWTensors]:
    made = []
    for n, shape in enumerate(SIZES):
        value = random_tensor(*shape, seed=n)
        made.append(AdamWTensors(
            value.clone(), random_tensor(*shape, seed=10 + n, dtype=gradient), torch.zeros_like(value),
            torch.zeros_like(value), weight_decay=0.1 * (n % 2),
            copy=torch.full(shape, torch.nan, dtype=torch.bfloat16) if copies else None,
        ))
    return made


def run(tensors: list[AdamWTensors], *, backend: str, steps: int = 3) -> None:
    for number in range(1, steps + 1):
        step = AdamWStep(1e-2, 0.9, 0.95, 1e-8, number)
        adamw(tensors, step=step, gradient_scale=torch.tensor(0.5), backend=backend)


@pytest.mark.parametrize(("gradient", "copies"), [(torch.float32, False), (torch.bfloat16, True)])
def test_three_steps_match_the_reference(gradient: torch.dtype, copies: bool) -> None:
    ours, truth = (tensors_of(gradient=gradient, copies=copies) for _ in range(2))
    run(ours, backend="native")
    run(truth, backend="reference")
    for one, other in zip(ours, truth, strict=True):
        for part in ("parameter", "first_moment", "second_moment"):
            assert_close(vars(one)[part], expected=vars(other)[part], tolerance=1e-6, reason="fp32, another order")
        if copies:
            assert torch.equal(one.copy, one.parameter.bfloat16())


def test_what_beta2_leaves_is_not_rounded() -> None:
    """1 - beta2 was taken in fp32: a second moment was off by 1.6e-4 of its size."""
    gradient, moments = torch.tensor([1e-3, 3.0, 2e4]), (torch.zeros(3), torch.zeros(3))
    one = AdamWTensors(torch.ones(3), gradient, *moments, weight_decay=0.0)
    adamw([one], step=AdamWStep(1e-2, 0.9, 0.9999, 1e-8, 1), backend="native")
    torch.testing.assert_close(one.second_moment, gradient.square() * 1e-4, rtol=1e-6, atol=0)


def test_a_gradient_in_a_negative_view_is_refused() -> None:
    """C++ stepped the wrong way: the view's memory holds the opposite numbers."""
    gradient = torch._neg_view(torch.ones(4))
    tensors = AdamWTensors(torch.ones(4), gradient, torch.zeros(4), torch.zeros(4), weight_decay=0.0)
    with pytest.raises(ValueError, match="adamw: gradient .*must hold its own numbers, which resolve_neg"):
        adamw([tensors], step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1))


def test_threads_do_not_change_a_bit() -> None:
    one, two = (tensors_of(gradient=torch.float32, copies=False) for _ in range(2))
    kept = torch.get_num_threads()
    sums = []
    try:
        for threads, tensors in ((1, one), (2, two)):
            torch.set_num_threads(threads)
            run(tensors, backend="native", steps=1)
            sums.append(sum_squares([t.gradient for t in tensors], backend="native"))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(one, two, strict=True))
    assert torch.equal(*sums)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_squares_of_mixed_tensors_add_up(backend: str) -> None:
    tensors = [random_tensor(*shape, seed=n, dtype=(torch.float32, torch.bfloat16)[n % 2])
               for n, shape in enumerate(SIZES)]
    tensors.append(random_tensor(9, 33, seed=9).mT)
    found, expected = sum_squares(tensors, backend=backend), sum_squares(tensors, backend="reference")
    assert_close(found, expected=expected, tolerance=1e-6, reason="fp32 sums of 16,384 elements")


def test_the_squares_of_no_tensors_are_zero_in_fp32() -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        total = sum_squares([])
    finally:
        torch.set_default_dtype(default)
    assert total.dtype == torch.float32 and total.item() == 0


def test_what_is_not_finite_shows() -> None:
    values = torch.ones(20_000)
    values[19_999] = torch.nan
    assert sum_squares([torch.ones(3), values], backend="native").isnan()
    values[19_999] = torch.inf
    assert sum_squares([values], backend="native").isinf()
    assert sum_squares([]) == 0.0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_backward_pass_over_weights_stepped_since_is_refused(backend: str) -> None:
    """C++ writes behind autograd's back: the gradient of the old product came out with the new weights."""
    weight = torch.ones(4, requires_grad=True)
    product = (weight * weight).sum()
    moments = torch.zeros(4), torch.zeros(4)
    one = AdamWTensors(weight, torch.ones(4), *moments, weight_decay=0.0)
    adamw([one], step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_updates_count_from_one() -> None:
    with pytest.raises(ValueError, match="number is 0; it counts updates from 1"):
        AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0)
