"""Routing analyses at their extremes."""

from __future__ import annotations

import pytest
import torch

from ernie5.evaluate.routing import busy_overlap, describe_routing, normalised_entropy


def test_entropy_is_one_for_even_use_and_zero_for_a_single_expert() -> None:
    assert normalised_entropy(torch.ones(8)).item() == pytest.approx(1.0)
    assert normalised_entropy(torch.eye(8)[3]).item() == pytest.approx(0.0, abs=1e-12)


def test_overlap_is_one_with_itself_and_zero_for_strangers() -> None:
    loads = torch.tensor([[9.0, 8, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 8, 9]])
    assert busy_overlap(loads).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_dead_experts_and_absent_groups_are_counted_not_hidden() -> None:
    loads = torch.zeros(2, 6, 4)
    loads[:, 0] = torch.tensor([4.0, 4, 4, 4])
    loads[1, 5] = torch.tensor([4.0, 0, 0, 0])
    loads[0, 5] = torch.tensor([0.0, 4, 0, 0])
    loads[0, :, 3] = 0
    figures = describe_routing(loads)
    assert figures.groups == ("text", "audio")
    assert figures.dead_experts == 1
    assert figures.max_load_ratio == pytest.approx((2.0, 1.6))
    assert figures.overlap_layers == (0, 1)


def test_a_model_without_any_token_gives_figures_not_a_crash() -> None:
    figures = describe_routing(torch.zeros(1, 6, 4))
    assert figures.groups == () and figures.dead_experts == 4
