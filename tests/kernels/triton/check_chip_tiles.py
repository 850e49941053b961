"""The tiles that a GPU's launches choose, at sizes that fill them and at ragged ones; interpreted they take minutes."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.attention import attention, plan_attention
from ernie5_kernels.grouped_gemm import grouped_gemm
from ernie5_kernels.grouped_swiglu import grouped_swiglu
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy
from ernie5_kernels.testing import assert_backends_agree, assert_close, kernel_device, random_tensor
from ernie5_kernels.token_rows import RowPlan

pytestmark = pytest.mark.skipif(kernel_device().type != "cuda", reason="asks CUDA")
BF16 = {"tolerance": 2e-2, "reason": "operands and results keep 8 bits, sums are fp32"}
WIDTHS = ((320, 264), (256, 256), (39, 21))  # the last cannot come by TMA


@pytest.mark.parametrize("rows", (16, 32, 64, 300, 700))
@pytest.mark.parametrize(("inner", "cols"), WIDTHS)
def test_bf16_products_match_the_reference_for_every_mean_of_rows(rows: int, inner: int, cols: int) -> None:
    counts = [rows, 0, rows + 1, 1, 3 * rows - 5]
    offsets = torch.tensor(counts).cumsum(0).to(kernel_device())
    inputs = (random_tensor(sum(counts) + 3, inner, dtype=torch.bfloat16),
              random_tensor(len(counts), cols, inner, seed=1, dtype=torch.bfloat16))
    assert_backends_agree(
        lambda r, w, b: grouped_gemm(r, weight=w, offsets=offsets, backend=b), inputs=inputs, **BF16
    )


@pytest.mark.parametrize("rows", (16, 32, 64, 300, 700))
@pytest.mark.parametrize(("inner", "cols"), WIDTHS)
@pytest.mark.parametrize("gathers", (False, True))
def test_activated_products_match_the_reference_for_every_mean_of_rows(
    rows: int, inner: int, cols: int, gathers: bool
) -> None:
    counts = [rows, 0, rows + 1, 1, 3 * rows - 4]
    offsets, total = torch.tensor(counts).cumsum(0).to(kernel_device()), sum(counts) + 2
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).to(kernel_device())
    plan = RowPlan(order // 2, torch.argsort(order).view(-1, 2))
    inputs = (random_tensor(total // 2, inner, dtype=torch.bfloat16),
              random_tensor(len(counts), 2 * cols, inner, seed=1, dtype=torch.bfloat16) / 8,
              random_tensor(total, seed=2))
    assert_backends_agree(
        lambda x, w, p, b: grouped_swiglu(
            x, gate_up=w, row_weights=p, offsets=offsets, plan=plan, backend=b,
            gathers=gathers if b == "triton" else None,
        ), inputs=inputs, **BF16
    )


@pytest.mark.parametrize("rows", (16, 32, 100, 700))
def test_fp8_products_stay_near_the_bf16_ones(rows: int) -> None:
    counts = [rows, 0, rows + 1, 3 * rows - 5]
    offsets = torch.tensor(counts).cumsum(0).to(kernel_device())
    x = random_tensor(sum(counts) + 3, 320, dtype=torch.bfloat16)
    weight = random_tensor(len(counts), 264, 320, seed=1, dtype=torch.bfloat16)
    narrow, exact = (grouped_gemm(x, weight=weight, offsets=offsets, fp8=fp8) for fp8 in (True, False))
    assert (narrow - exact).float().norm() / exact.float().norm() < 6e-2, "e4m3 keeps 4 bits"


def intervals_of(tokens: int) -> torch.Tensor:
    """Causal documents of 100 and more tokens, each with a block of 40 tokens that see each other."""
    columns = []
    for start in range(0, tokens, 137):
        end = min(tokens, start + 137)
        columns += [(start + 20 if start + 20 <= j < start + 60 else j, 0, 0, end) for j in range(start, end)]
    return torch.tensor(columns, dtype=torch.int32, device=kernel_device()).unsqueeze(0)


@pytest.mark.parametrize(("tokens", "width"), [(700, 128), (513, 64), (130, 80), (200, 256)])
def test_attention_matches_the_reference(tokens: int, width: int) -> None:
    plan = plan_attention(intervals_of(tokens), batch_rows=1, query_tokens=tokens, key_tokens=tokens)
    inputs = (random_tensor(1, tokens, 4, width, dtype=torch.bfloat16),
              random_tensor(1, tokens, 2, width, seed=1, dtype=torch.bfloat16),
              random_tensor(1, tokens, 2, width, seed=2, dtype=torch.bfloat16))
    assert_backends_agree(
        lambda q, k, v, b: attention(q, key=k, value=v, plan=plan, backend=b), inputs=inputs, **BF16
    )


@pytest.mark.parametrize(("rows", "width"), [(300, 136), (257, 256), (65, 33)])
def test_the_linear_head_matches_the_reference(rows: int, width: int) -> None:
    targets = torch.randint(0, 1003, (rows,), generator=torch.Generator().manual_seed(0)).to(kernel_device())
    hidden, weight = random_tensor(rows, width), random_tensor(1003, width, seed=1) / 8
    narrow = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    loss, truth = (
        linear_cross_entropy(x[0], weight=x[1], targets=targets, backend=b)
        for x, b in ((narrow, "triton"), (wide, "reference"))
    )
    assert_close(loss, expected=truth, tolerance=1e-4, reason="products of bf16 are exact in fp32, sums are not")
    pairs = zip(torch.autograd.grad(loss, narrow), torch.autograd.grad(truth, wide), strict=True)
    for one, other in pairs:
        assert_close(one, expected=other, **BF16)
