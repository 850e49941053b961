"""AdamW over many tensors of odd sizes against the plain loop and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.adamw import AdamWStep, AdamWTensors, adamw
from ernie5_kernels.adamw import kernel as triton_adamw
from ernie5_kernels.testing import assert_close, kernel_device, random_tensor

SIZES = ((1,), (0,), (7, 3), (4096,), (4097,))


def tensors_of(*, gradient: torch.dtype, copies: bool) -> list[AdamWTensors]:
    made = []
    for n, shape in enumerate(SIZES):
        value = random_tensor(*shape, seed=n)
        made.append(AdamWTensors(
            value.clone(), random_tensor(*shape, seed=10 + n, dtype=gradient), torch.zeros_like(value),
            torch.zeros_like(value), weight_decay=0.1 * (n % 2),
            copy=torch.empty(shape, dtype=torch.bfloat16, device=value.device) if copies else None,
        ))
    return made


@pytest.mark.parametrize(("gradient", "copies"), [(torch.float32, False), (torch.bfloat16, True)])
def test_three_steps_match_the_reference(gradient: torch.dtype, copies: bool) -> None:
    scale = torch.tensor(0.5, device=kernel_device())
    ours, truth = (tensors_of(gradient=gradient, copies=copies) for _ in range(2))
    for number in (1, 2, 3):
        step = AdamWStep(1e-2, 0.9, 0.95, 1e-8, number)
        adamw(ours, step=step, gradient_scale=scale, backend="triton")
        adamw(truth, step=step, gradient_scale=scale, backend="reference")
    for one, other in zip(ours, truth, strict=True):
        for part in ("parameter", "first_moment", "second_moment"):
            assert_close(vars(one)[part], expected=vars(other)[part], tolerance=1e-6, reason="fp32, another order")
        if copies:
            assert torch.equal(one.copy, one.parameter.bfloat16())


def test_what_beta2_leaves_is_not_rounded() -> None:
    gradient = torch.tensor([1e-3, 3.0, 2e4], device=kernel_device())
    one = AdamWTensors(*map(torch.zeros_like, [gradient] * 4), weight_decay=0.0)
    one.gradient.copy_(gradient)
    adamw([one], step=AdamWStep(1e-2, 0.9, 0.9999, 1e-8, 1), backend="triton")
    torch.testing.assert_close(one.second_moment, gradient.square() * 1e-4, rtol=1e-6, atol=0)


def shifted(x: torch.Tensor, *, elements: int) -> torch.Tensor:
    """x where 16 bytes do not divide its address."""
    return x.new_zeros(x.numel() + elements)[elements:].view_as(x).copy_(x)


def test_one_tensor_that_lies_askew_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own launch is told that addresses are divided by 1 byte, and nobody's bits change."""
    ours, truth = (tensors_of(gradient=torch.bfloat16, copies=True) for _ in range(2))
    for askew, name in enumerate(("parameter", "gradient", "copy"), 1):
        at = askew + 1
        moved = {name: shifted(vars(ours[at])[name], elements=1)}
        ours[at] = AdamWTensors(**{**vars(ours[at]), **moved})
        launches, real = [], triton_adamw.adamw_kernel

        class Recorded:
            def __getitem__(self, grid: tuple[int, ...]) -> object:
                def run(*arguments: object, **options: object) -> object:
                    launches.append((len(arguments[0]), arguments[-2]))
                    return real[grid](*arguments, **options)

                return run

        with monkeypatch.context() as watched:
            watched.setattr(triton_adamw, "adamw_kernel", Recorded())
            adamw(ours, step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1), backend="triton")
        assert sorted(launches) == sorted([(len(SIZES) - 1 - askew, 16), (askew, 1)]), name
        adamw(truth, step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1), backend="triton")
    for one, other in zip(ours, truth, strict=True):
        for part in ("parameter", "first_moment", "second_moment", "copy"):
            assert torch.equal(vars(one)[part], vars(other)[part]), part


def test_the_reference_is_pytorchs_adamw() -> None:
    ours = tensors_of(gradient=torch.float32, copies=False)
    theirs = [one.parameter.clone().requires_grad_() for one in ours]
    groups = [{"params": [p], "weight_decay": one.weight_decay} for p, one in zip(theirs, ours, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for p, one in zip(theirs, ours, strict=True):
        p.grad = one.gradient
    for number in (1, 2):
        optimizer.step()
        adamw(ours, step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, number), backend="triton")
    for p, one in zip(theirs, ours, strict=True):
        assert_close(one.parameter, expected=p.detach(), tolerance=1e-6, reason="fp32, another order")


def test_fp64_is_refused_before_its_bits_are_taken_for_fp32() -> None:
    made = tensors_of(gradient=torch.float32, copies=False)[2]
    parts = made.parameter, made.gradient, made.first_moment, made.second_moment
    wide = AdamWTensors(*(part.double() for part in parts), weight_decay=0.1)
    before = wide.parameter.clone()
    with pytest.raises(ValueError, match="adamw: parameter .* dtype torch.float64.*backend reference"):
        adamw([wide], step=AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1), backend="triton")
    assert torch.equal(wide.parameter, before)


def test_the_default_device_of_the_program_changes_nothing() -> None:
    """Tables are made on the host, wherever else the program wants its tensors."""
    ours, truth = (tensors_of(gradient=torch.float32, copies=False) for _ in range(2))
    step = AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1)
    with torch.device("meta"):
        adamw(ours, step=step, backend="triton")
    adamw(truth, step=step, backend="triton")
    assert all(torch.equal(one.parameter, other.parameter) for one, other in zip(ours, truth, strict=True))


def test_wrong_tensors_are_refused_by_name() -> None:
    good = tensors_of(gradient=torch.float32, copies=False)[2]
    step = AdamWStep(1e-2, 0.9, 0.95, 1e-8, 1)
    cases = [
        ({"gradient": good.gradient[:2]}, r"adamw: gradient has shape \(2, 3\)"),
        ({"first_moment": good.first_moment.bfloat16()}, "adamw: first_moment .* must be float32"),
        ({"gradient": good.gradient.mT.contiguous().mT}, "adamw: gradient .* contiguous"),
        ({"parameter": good.parameter.half()}, "adamw: parameter .* must be float32"),
        ({"parameter": good.parameter.double()}, "adamw: gradient .* must be float64"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            adamw([AdamWTensors(**{**vars(good), **change})], step=step)
