"""AdamW with little state: C++ against PyTorch, and what random rounding promises."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.adamw_compact import AdamWStep, CompactTensors, Moment, adamw_compact, count_blocks
from ernie5_kernels.adamw_compact.reference import FIRST_SHIFT, SECOND_SHIFT, decode, round_at_random
from ernie5_kernels.native.library import native_library
from ernie5_kernels.testing import assert_close

native_only = pytest.mark.skipif(native_library() is None, reason="no C++ compiler")
SIZES = ((1,), (7, 3), (256,), (257,), (16_385,), (3, 9_000))


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moment(shape: tuple[int, ...], *, coded: bool) -> Moment:
    if not coded:
        return Moment(torch.zeros(shape))
    return Moment(torch.zeros(shape, dtype=torch.uint8), torch.zeros(count_blocks(torch.Size(shape).numel())))


def tensors_of(shape: tuple[int, ...], *, dtype: torch.dtype, coded: bool, seed: int = 3) -> CompactTensors:
    copy = torch.full(shape, torch.nan, dtype=torch.bfloat16) if dtype == torch.float32 else None
    return CompactTensors(
        drawn(*shape).to(dtype), torch.zeros(shape), moment(shape, coded=coded), moment(shape, coded=coded), 0.1, seed,
        copy,
    )


def run(one: CompactTensors, *, backend: str, steps: int = 1, dtype: torch.dtype = torch.float32) -> None:
    for number in range(1, steps + 1):
        # magnitudes that differ by 1e8 within a block, and zeros
        sizes = torch.logspace(-8, 0, 17).repeat(one.parameter.numel())[: one.parameter.numel()]
        gradient = drawn(*one.parameter.shape, seed=number).view(-1) * sizes * (sizes > 1e-7)
        own = CompactTensors(**{**vars(one), "gradient": gradient.view(one.parameter.shape).to(dtype)})
        step = AdamWStep(1e-2, 0.9, 0.95, 1e-12, number)
        adamw_compact([own], step=step, gradient_scale=torch.tensor(0.5), backend=backend)


@native_only
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_does_what_pytorch_does(dtype: torch.dtype, coded: bool, gradient: torch.dtype) -> None:
    for shape in SIZES:
        ours, truth = (tensors_of(shape, dtype=dtype, coded=coded) for _ in range(2))
        run(ours, backend="native", dtype=gradient)
        run(truth, backend="reference", dtype=gradient)
        if coded:
            for mine, other in ((ours.first, truth.first), (ours.second, truth.second)):
                apart = (mine.values.int() - other.values.int()).abs()
                # fp32 in another order crosses a threshold of the random numbers now and then, and moves one code
                assert apart.max() <= 1 and apart.float().mean() <= 2e-3 + 1.01 / apart.numel() * (apart.numel() < 500)
                assert_close(mine.scales, expected=other.scales, tolerance=1e-6, reason="another order of fp32")
        else:
            assert_close(ours.first.values, expected=truth.first.values, tolerance=1e-6, reason="another order")
            assert_close(ours.second.values, expected=truth.second.values, tolerance=1e-6, reason="another order")
        if dtype == torch.float32:
            assert_close(ours.parameter, expected=truth.parameter, tolerance=1e-6, reason="another order of fp32")
            assert torch.equal(ours.copy, ours.parameter.bfloat16())
        else:
            same = ours.parameter == truth.parameter
            assert same.float().mean() > 0.99 - 1.01 / same.numel() * (same.numel() < 500)
            tolerance, reason = 2**-7, "one step of bf16 where a threshold is crossed"
            assert_close(ours.parameter, expected=truth.parameter.float(), tolerance=tolerance, reason=reason)


@native_only
def test_threads_do_not_change_a_bit_and_seeds_do() -> None:
    kept, found = torch.get_num_threads(), []
    try:
        for threads, seed in ((1, 3), (2, 3), (1, 4)):
            torch.set_num_threads(threads)
            found.append(tensors_of((3, 40_000), dtype=torch.bfloat16, coded=True, seed=seed))
            run(found[-1], backend="native", steps=2)
    finally:
        torch.set_num_threads(kept)
    one, two, other = ((x.parameter, x.first.values, x.second.values) for x in found)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native_only), "reference"])
def test_a_bf16_weight_moves_on_average_as_an_fp32_one(backend: str) -> None:
    """Steps of 1e-4 of a weight of 1, a 40th of the step of bf16: rounded to nearest, it would stand still."""
    count, steps = 4_096, 50
    one = CompactTensors(
        torch.ones(count).bfloat16(), torch.ones(count), Moment(torch.zeros(count)), Moment(torch.zeros(count)), 0.0, 1
    )
    for number in range(1, steps + 1):
        adamw_compact([one], step=AdamWStep(1e-4, 0.9, 0.95, 1e-8, number), backend=backend)
    moved = 1.0 - one.parameter.float()
    # standard error of the mean: step of bf16 below 1 is 2^-8, each weight is off by at most that, 4,096 weights
    assert abs(float(moved.mean()) - steps * 1e-4) < 5 * 2**-8 * 0.5 / count**0.5
    assert torch.equal(torch.ones(3).bfloat16() - 1e-4, torch.ones(3).bfloat16())


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native_only), "reference"])
def test_moments_of_8_bits_follow_those_of_fp32(backend: str) -> None:
    """Means over many equal elements: the codes' rounding has no drift, also when gradients stop and means decay."""
    count, steps = 8_192, 40
    coded, plain = (
        CompactTensors(torch.ones(count), torch.zeros(count), *(moment((count,), coded=c) for _ in range(2)), 0.0, 1)
        for c in (True, False)
    )
    sizes = torch.tensor([1.0, 0.3, 0.01, 1e-3]).repeat(count // 4)
    for number in range(1, steps + 1):
        gradient = sizes * (0.5 + number % 3) * (number < 25)
        for one in (coded, plain):
            own = CompactTensors(**{**vars(one), "gradient": gradient})
            adamw_compact([own], step=AdamWStep(1e-3, 0.9, 0.95, 1e-8, number), backend=backend)
    first = decode(coded.first, shift=FIRST_SHIFT, has_sign=True).view(-1, 4).mean(0)
    second = decode(coded.second, shift=SECOND_SHIFT, has_sign=False).view(-1, 4).mean(0)
    assert torch.allclose(first, plain.first.values[:4], rtol=0.03), "40 roundings of 6 % over 2,048 elements"
    assert torch.allclose(second, plain.second.values[:4].sqrt(), rtol=0.03)
    drift = (coded.parameter - plain.parameter).view(-1, 4).mean(0).abs()
    assert (drift < 0.03 * (1 - plain.parameter[:4])).all()


def test_a_second_moment_above_zero_never_reads_as_zero() -> None:
    one = CompactTensors(
        torch.zeros(256), torch.full((256,), 1e-7), moment((256,), coded=True), moment((256,), coded=True), 0.0, 1
    )
    one.gradient[0], one.gradient[1] = 1.0, 0.0
    adamw_compact([one], step=AdamWStep(1e-2, 0.9, 0.95, 1e-12, 1))
    assert (one.second.values[2:] == 1).all() and one.second.values[1] == 0
    adamw_compact([one], step=AdamWStep(1e-2, 0.9, 0.95, 1e-12, 2))
    assert one.parameter.abs().max() < 0.1, "no update far beyond the learning rate"


@pytest.mark.parametrize("backend", [pytest.param("native", marks=native_only), "reference"])
def test_a_nan_stays_in_weight_and_block_whatever_its_bits(backend: str) -> None:
    """0x7fffffff is the NaN that a GPU makes: random bits added to it would give zero."""
    one = CompactTensors(
        torch.ones(700).bfloat16(), torch.ones(700), *(moment((700,), coded=True) for _ in range(2)), 0.0, 1
    )
    one.gradient.view(torch.int32)[300] = 0x7FFFFFFF
    adamw_compact([one], step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1), backend=backend)
    assert one.parameter[300].isnan() and one.parameter.isnan().sum() == 1
    assert one.first.scales.isnan().tolist() == one.second.scales.isnan().tolist() == [False, True, False]


def test_rounding_keeps_what_fits_and_infinity() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, 3e38])
    assert torch.equal(round_at_random(values, seed=5)[:6], values[:6].bfloat16())


def test_tensors_that_do_not_fit_are_named() -> None:
    good = tensors_of((7, 3), dtype=torch.bfloat16, coded=True)
    for wrong, text in (
        ({"gradient": torch.zeros(7, 2)}, "gradient has shape"),
        ({"parameter": torch.zeros(7, 3, dtype=torch.float16)}, "float32 or bfloat16"),
        ({"first": Moment(good.first.values, torch.zeros(2))}, "first scales"),
        ({"second": Moment(torch.zeros(7, 3))}, "uint8"),
        ({"copy": torch.zeros(7, 3, dtype=torch.bfloat16)}, "only float32 has a copy"),
    ):
        with pytest.raises(ValueError, match=text):
            adamw_compact([CompactTensors(**{**vars(good), **wrong})], step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1))
