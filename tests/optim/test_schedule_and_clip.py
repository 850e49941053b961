"""Schedules against their formulas, clipping against torch, groups and Muon."""

from __future__ import annotations

import math

import pytest
import torch

from ernie5.optim.build import build_optimizer
from ernie5.optim.clip import global_norm, scale_gradients
from ernie5.optim.config import OptimConfig, ScheduleConfig
from ernie5.optim.groups import build_groups
from ernie5.optim.newton_schulz import orthogonalise
from ernie5.optim.schedule import learning_rate, warmup_steps


def config(kind: str, warmup: int | None = 10) -> OptimConfig:
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, final_ratio=0.1, decay_fraction=0.25)
    return OptimConfig(learning_rate=2.0, schedule=schedule)


def test_warm_up_rises_linearly_from_the_first_step_to_the_peak() -> None:
    rates = [learning_rate(step, config=config("constant"), total_steps=100) for step in range(12)]
    assert rates == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)] + [2.0, 2.0])


def test_default_warm_up_is_five_percent_but_at_most_two_thousand_steps() -> None:
    assert [warmup_steps(config("constant", None), total_steps=n) for n in (5, 100, 1_000_000)] == [1, 5, 2000]


def test_cosine_follows_its_formula_and_ends_at_the_final_rate() -> None:
    for step in (10, 37, 99):
        done = (step - 10 + 1) / 90
        expected = 0.2 + 1.8 * (1 + math.cos(math.pi * done)) / 2
        assert learning_rate(step, config=config("cosine"), total_steps=100) == pytest.approx(expected)
    assert learning_rate(99, config=config("cosine"), total_steps=100) == pytest.approx(0.2)
    assert learning_rate(500, config=config("cosine"), total_steps=100) == pytest.approx(0.2)


def test_wsd_is_flat_and_then_falls_with_one_minus_square_root() -> None:
    assert learning_rate(74, config=config("wsd"), total_steps=100) == 2.0
    for step in (75, 80, 99):
        expected = 0.2 + 1.8 * (1 - math.sqrt((step - 75 + 1) / 25))
        assert learning_rate(step, config=config("wsd"), total_steps=100) == pytest.approx(expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
def test_the_shortest_runs_have_positive_finite_rates(kind: str, steps: int) -> None:
    rates = [learning_rate(step, config=config(kind, None), total_steps=steps) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)


def test_clipping_equals_torch_and_zero_clips_nothing() -> None:
    gradients = [torch.randn(7, 3), torch.randn(5), torch.zeros(2)]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    mine = [gradient.clone() for gradient in gradients]
    assert float(global_norm(mine)) == pytest.approx(float(norm))
    scale_gradients(mine, norm=norm, max_norm=0.5)
    assert all(torch.allclose(a, p.grad) for a, p in zip(mine, parameters, strict=True))
    untouched = [gradient.clone() for gradient in gradients]
    scale_gradients(untouched, norm=norm, max_norm=0.0)
    assert all(torch.equal(a, b) for a, b in zip(untouched, gradients, strict=True))


def test_the_norm_is_summed_over_ranks_as_squares() -> None:
    assert float(global_norm([torch.full((4,), 1.0)], reduce=lambda squares: squares * 4)) == pytest.approx(4.0)


def test_vectors_do_not_decay_and_matrices_do() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    groups = {group.name: group for group in build_groups(model, weight_decay=0.1)}
    assert groups["plain"].weight_decay == 0.0 and set(groups["plain"].names) == {"0.bias", "1.weight", "1.bias"}
    assert groups["decay"].weight_decay == 0.1 and groups["decay"].names == ("0.weight",)


@pytest.mark.parametrize("shape", [(6, 6), (3, 9), (9, 3), (4, 5, 3)])
def test_newton_schulz_brings_every_singular_value_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape), steps=8).float())
    assert 0.5 < float(values.min()) and float(values.max()) < 1.4


def test_muon_lowers_a_quadratic_and_keeps_state_for_every_parameter() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = build_optimizer(
        build_groups(model, weight_decay=0.0, split_matrices=True), config=OptimConfig(name="muon", learning_rate=0.05)
    )
    inputs = torch.randn(32, 4)
    losses = []
    for _ in range(30):
        loss = (model(inputs) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert all(optimizer.state[parameter] for parameter in model.parameters())
