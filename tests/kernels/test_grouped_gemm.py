"""Grouped products: empty groups, all rows in one group, rows past the end, every dtype."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.grouped_gemm import grouped_gemm
from ernie5_kernels.testing import assert_close, outputs_and_gradients, poisoned_memory

COUNTS = ([3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [63, 1, 0, 129], [1, 1, 1, 1])


def problem(counts: list[int], *, extra: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(counts) + extra, 7, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(counts), 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    return rows, weight, torch.tensor(counts).cumsum(0)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_grouped_products_match_the_reference_with_gradients(
    counts: list[int], extra: int, dtype: torch.dtype, tolerance: float
) -> None:
    rows, weight, offsets = problem(counts, extra=extra, dtype=dtype)
    with poisoned_memory():
        actual, expected = (
            outputs_and_gradients(
                lambda r, w, b=b: grouped_gemm(r, weight=w, offsets=offsets, backend=b), inputs=(rows, weight)
            )
            for b in ("torch", "reference")
        )
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, expected=other, tolerance=tolerance, reason="rounding of the dtype")


def test_an_empty_group_gets_a_zero_gradient_and_rows_past_the_end_give_zero() -> None:
    rows, weight, offsets = problem([3, 0, 2], extra=2, dtype=torch.float32)
    out, grad_rows, grad_weight = outputs_and_gradients(
        lambda r, w: grouped_gemm(r, weight=w, offsets=offsets), inputs=(rows, weight)
    )
    assert torch.equal(grad_weight[1], torch.zeros(5, 7))
    assert torch.equal(out[5:], torch.zeros(2, 5))
    assert torch.equal(grad_rows[5:], torch.zeros(2, 7))


def test_shapes_that_do_not_fit_are_refused() -> None:
    rows, weight, offsets = problem([3, 2], extra=0, dtype=torch.float32)
    with pytest.raises(ValueError, match="grouped_gemm"):
        grouped_gemm(rows, weight=weight.transpose(1, 2), offsets=offsets)
