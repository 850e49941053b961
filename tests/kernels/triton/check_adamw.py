"""AdamW over many tensors of odd sizes against the plain loop and against PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.adamw import AdamWStep, AdamWTensors, adamw
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
