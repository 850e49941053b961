"""Scaled casts and fp8 products: the values of the reference bit for bit, products against the widened numbers."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.grouped_gemm import grouped_gemm, scaled
from ernie5_kernels.grouped_gemm.reference import grouped_gemm_reference
from ernie5_kernels.quant_cast import quant_cast
from ernie5_kernels.quant_cast.kernel import quant_cast_triton
from ernie5_kernels.testing import assert_close, kernel_device, poisoned_memory, random_tensor

# fp8 tensor cores keep some 13 bits of each of the 128 addends that they sum at once (arXiv:2412.19437, 3.3.2)
ON_GPU = kernel_device().type == "cuda"
SUMS, REASON = (2e-3, "the tensor core's short sums") if ON_GPU else (1e-5, "fp32 sums in another order")


@pytest.mark.parametrize(("shape", "block_rows", "transposed"), [
    ((5, 130), 1, False), ((0, 8), 1, False), ((17, 128), 1, False),
    ((2, 130, 140), 128, False), ((2, 130, 140), 128, True), ((1, 3, 5), 128, True),
])
def test_casts_equal_the_reference(shape: tuple[int, ...], block_rows: int, transposed: bool) -> None:
    x = random_tensor(*shape) * 100
    with poisoned_memory():
        ours, truth = (quant_cast(x, block_rows=block_rows, transposed=transposed, backend=b)
                       for b in ("triton", "reference"))
    assert_close(ours.scales, expected=truth.scales, tolerance=1e-6, reason="one fp32 division")
    assert_close(ours.widened(), expected=truth.widened(), tolerance=2.0 ** -4, reason="a tie may round either way")
    same = (ours.values.view(torch.uint8) == truth.values.view(torch.uint8)).float().mean() if x.numel() else 1.0
    assert same > 0.999, "only ties may differ"


def test_a_cast_is_exact_for_numbers_that_e4m3_holds_and_zero_stays_zero() -> None:
    x = torch.zeros(2, 130, device=kernel_device())
    x[0, :4] = torch.tensor([448.0, -1.0, 0.5, 3.5])
    cast = quant_cast(x, block_rows=1, backend="triton")
    assert torch.equal(cast.widened(), x)


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [70, 1, 0, 29]])
def test_fp8_products_and_gradients_match_products_of_the_widened_numbers(counts: list[int]) -> None:
    rows, offsets = sum(counts) + 2, torch.tensor(counts, device=kernel_device()).cumsum(0)
    x, weight = random_tensor(rows, 140), random_tensor(len(counts), 24, 140, seed=1)
    grad = random_tensor(rows, 24, seed=2)
    bad, bad_grad = x.clone(), grad.clone()
    bad[-2:], bad_grad[-2:] = float("nan"), float("nan")  # rows past the end, which the kernels may not use
    leaves = bad.requires_grad_(), weight.clone().requires_grad_()
    with poisoned_memory():
        out = grouped_gemm(leaves[0], weight=leaves[1], offsets=offsets, fp8=True)
        got = torch.autograd.grad(out, leaves, bad_grad)
    narrow = {"x": quant_cast(x, block_rows=1), "w": quant_cast(weight, block_rows=128)}
    wide_w = narrow["w"].widened()
    expected = grouped_gemm_reference(narrow["x"].widened(), weight=wide_w, offsets=offsets)
    assert_close(out, expected=expected, tolerance=SUMS, reason=REASON)
    back = grouped_gemm_reference(quant_cast(grad, block_rows=1).widened(), weight=wide_w.mT, offsets=offsets)
    assert_close(got[0], expected=back, tolerance=max(1e-4, SUMS),
                 reason=f"{REASON}; weights cast from the other side share their scales")
    exact = leaves[1].detach().clone().requires_grad_()
    grouped_gemm_reference(x, weight=exact, offsets=offsets).backward(grad)
    assert_close(got[1], expected=exact.grad, tolerance=1e-5, reason="not in fp8")


def test_gradients_that_nobody_wants_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name in ("multiply_scaled", "grouped_outer"):
        monkeypatch.setattr(scaled, name, lambda *given, name=name, real=getattr(scaled, name), **named: (
            made.append(name), real(*given, **named))[1])
    offsets = torch.tensor([4, 6], device=kernel_device())
    for frozen, expected in (("weight", ["multiply_scaled"]), ("rows", ["grouped_outer"])):
        rows = random_tensor(6, 128).requires_grad_(frozen != "rows")
        weight = random_tensor(2, 16, 128, seed=1).requires_grad_(frozen != "weight")
        out = grouped_gemm(rows, weight=weight, offsets=offsets, fp8=True)
        made.clear()
        out.sum().backward()
        assert made == expected, frozen


def test_fp8_products_stay_near_the_exact_ones() -> None:
    x, weight, offsets = random_tensor(8, 256), random_tensor(1, 16, 256), torch.tensor([8], device=kernel_device())
    out = grouped_gemm(x, weight=weight, offsets=offsets, fp8=True)
    exact = grouped_gemm_reference(x, weight=weight, offsets=offsets)
    error = (out - exact).norm() / exact.norm()
    assert 1e-3 < error < 6e-2, "e4m3 keeps 4 bits: a relative error of some 3 per cent, and not none"


def test_fp8_products_compile_into_one_graph() -> None:
    offsets = torch.tensor([3, 3, 9], device=kernel_device())
    ours, plain = ((random_tensor(9, 128).requires_grad_(), random_tensor(3, 16, 128).requires_grad_()) for _ in "ab")

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return grouped_gemm(rows, weight=weight, offsets=offsets, fp8=True)

    out, expected = torch.compile(product, fullgraph=True, backend="aot_eager")(*ours), product(*plain)
    assert torch.equal(out, expected)
    for one, other in zip(*(torch.autograd.grad(y.sum(), x) for y, x in ((out, ours), (expected, plain))), strict=True):
        assert torch.equal(one, other)


def test_the_cast_refuses_what_it_cannot_do_and_passes_opcheck() -> None:
    with pytest.raises(ValueError, match="block_rows is 7"):
        quant_cast(random_tensor(2, 8), block_rows=7)
    with pytest.raises(ValueError, match=r"quant_cast: x has shape \(8,\)"):
        quant_cast(random_tensor(8), block_rows=1)
    with pytest.raises(ValueError, match="no transpose"):
        quant_cast(random_tensor(2, 8), block_rows=1, transposed=True)
    without_gradients = ("test_schema", "test_faketensor")
    torch.library.opcheck(quant_cast_triton, (random_tensor(1, 3, 5), 128, True), test_utils=without_gradients)
    rows, weight = quant_cast(random_tensor(5, 130), block_rows=1), quant_cast(random_tensor(2, 4, 130), block_rows=128)
    operands = (rows.values, rows.scales, weight.values, weight.scales, torch.tensor([2, 3], device=kernel_device()))
    without_clones = ("test_faketensor",)  # PyTorch's check of the schema multiplies, which e4m3 cannot
    torch.library.opcheck(scaled.scaled_gemm_triton, (*operands, torch.bfloat16), test_utils=without_clones)
