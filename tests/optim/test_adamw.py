"""Our AdamW against torch's: whole parameters, flat pieces put in later as by ZeRO, bf16 gradients and copies, fp64."""

from __future__ import annotations

import pytest
import torch

from ernie5.errors import ConfigError
from ernie5.optim.adamw import MOMENTS, AdamW, materialise_state
from ernie5.optim.build import build_optimizer
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import build_groups
from ernie5_kernels.native.library import native_library
from ernie5_kernels.testing import assert_close

CONFIG = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
SIZES = (7, 33, 5)


def model_of(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Linear(*SIZES[:2]), torch.nn.LayerNorm(33), torch.nn.Linear(*SIZES[1:])
    return torch.nn.Sequential(*layers).to(dtype)


def torchs(groups: list[dict]) -> torch.optim.AdamW:
    betas = (CONFIG.beta1, CONFIG.beta2)
    return torch.optim.AdamW(groups, lr=CONFIG.learning_rate, betas=betas, eps=CONFIG.epsilon)


def plain_groups(groups: list[dict]) -> list[dict]:
    return [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]


def both(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, AdamW, torch.nn.Module, torch.optim.AdamW]:
    ours, theirs = model_of(dtype), model_of(dtype)
    other = AdamW(build_groups(theirs, weight_decay=CONFIG.weight_decay), config=CONFIG)
    return (
        ours, AdamW(build_groups(ours, weight_decay=CONFIG.weight_decay), config=CONFIG),
        theirs, torchs(plain_groups(other.param_groups)),
    )


def gradients(model: torch.nn.Module, *, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for n, parameter in enumerate(model.parameters()):
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if (step, n) == (1, 2) else drawn  # one that a step leaves out has a count of its own


@pytest.mark.parametrize(
    ("dtype", "tolerance", "reason"),
    [(torch.float32, 1e-6, "another order of fp32"), (torch.float64, 1e-13, "the same in fp64")],
)
def test_four_steps_equal_torchs(dtype: torch.dtype, tolerance: float, reason: str) -> None:
    ours, optimizer, theirs, other = both(dtype)
    for step in range(4):
        for model, one in ((ours, optimizer), (theirs, other)):
            gradients(model, step=step)
            for group in one.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            one.step()
    for mine, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine, expected=parameter, tolerance=tolerance, reason=reason)
        for key in MOMENTS:
            expected = other.state[parameter][key]
            assert_close(optimizer.state[mine][key], expected=expected, tolerance=tolerance, reason=reason)
        assert optimizer.state[mine]["step"] == other.state[parameter]["step"]


def test_flat_pieces_in_the_place_of_parameters_step_as_torchs() -> None:
    """What DeepSpeed does: other tensors in the groups, one group at a time; nothing is kept for the first ones."""
    _, optimizer, _, other = both()
    torch.manual_seed(1)
    for one in (optimizer, other):
        torch.manual_seed(1)
        for group in one.param_groups:
            group["params"] = [torch.randn(20_001).requires_grad_()]
    for step in range(3):
        for one in (optimizer, other):
            whole = one.param_groups
            for index, group in enumerate(whole):
                generator = torch.Generator().manual_seed(10 * step + index)
                group["params"][0].grad = torch.randn(20_001, generator=generator)
                one.param_groups = [group]
                one.step()
            one.param_groups = whole
    for group, expected in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert_close(group["params"][0], expected=expected["params"][0], tolerance=1e-6, reason="another order of fp32")
    assert len(optimizer.state) == len(optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_bf16_weights_follow_their_masters_and_gradients_are_clipped_on_the_way(name: str) -> None:
    """The scale equals scaling the gradients first; the copy is the master, rounded."""
    parts = []
    for scaled in (True, False):
        model = model_of()
        empty = {p: torch.full_like(p, torch.nan, dtype=torch.bfloat16) for p in model.parameters()}
        copies = {p: torch.nn.Parameter(values) for p, values in empty.items()}
        groups = build_groups(model, weight_decay=0.1, split_matrices=name == "muon")
        optimizer = build_optimizer(groups, config=OptimConfig(name=name, learning_rate=1e-2), copies=copies)
        gradients(model, step=0)
        if not scaled:
            for parameter in model.parameters():
                parameter.grad *= 0.25
        optimizer.step(gradient_scale=torch.tensor(0.25) if scaled else None)
        assert all(torch.equal(copy, p.bfloat16()) for p, copy in copies.items())
        parts.append(list(model.parameters()))
    for scaled, expected in zip(*parts, strict=True):
        assert_close(scaled, expected=expected, tolerance=1e-6, reason="the scale is a power of two")


@pytest.mark.skipif(native_library() is None, reason="no C++ compiler")
def test_a_bf16_gradient_is_read_as_it_is() -> None:
    ours, optimizer, theirs, other = both()
    for parameter, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        parameter.grad_dtype = None
        parameter.grad = torch.randn(parameter.shape).bfloat16()
        expected.grad = parameter.grad.float()
    optimizer.step()
    other.step()
    for mine, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine, expected=parameter, tolerance=1e-6, reason="another order of fp32")


def test_state_can_be_there_before_the_first_step_and_goes_through_a_state_dict() -> None:
    ours, optimizer, _, _ = both()
    assert not optimizer.state
    materialise_state(optimizer)
    gradients(ours, step=0)
    optimizer.step()
    again, other, _, _ = both()
    other.load_state_dict(optimizer.state_dict())
    for mine, parameter in zip(ours.parameters(), again.parameters(), strict=True):
        assert all(torch.equal(optimizer.state[mine][key], other.state[parameter][key]) for key in ("step", *MOMENTS))


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_a_moment_that_never_moves_is_refused(name: str) -> None:
    """Its correction divides by zero, at the first step."""
    with pytest.raises(ConfigError, match=rf"{name} = 1.0: must be at least 0 and below 1"):
        OptimConfig(**{name: 1.0})
