"""Balance figures against plain Python, with experts, layers and groups that saw nothing."""

from __future__ import annotations

import math

import torch

from ernie5.observe.experts import bias_spread, group_overlap, load_entropy, summarise_loads


def entropy(loads: list[float]) -> float:
    total = sum(loads)
    return -sum(x / total * math.log(x / total) for x in loads if x) / math.log(len(loads))


def test_entropy_ratio_and_dead_experts_match_plain_arithmetic() -> None:
    loads = [[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 5.0]]
    summary = summarise_loads(torch.tensor(loads))
    expected = torch.tensor([entropy(row) for row in loads], dtype=torch.float64)
    assert torch.allclose(summary.entropy, expected, atol=1e-12)  # fp64 sums of four terms
    assert summary.max_ratio.tolist() == [1.0, 4.0, 2.5]
    assert summary.dead.tolist() == [0, 3, 1]


def test_a_layer_without_tokens_is_nan_and_a_nanmean_leaves_it_out() -> None:
    summary = summarise_loads(torch.tensor([[0.0, 0.0], [3.0, 3.0]]))
    assert summary.entropy.isnan().tolist() == [True, False]
    assert summary.max_ratio.isnan().tolist() == [True, False]
    assert summary.entropy.nanmean() == 1.0


def test_a_single_expert_is_perfectly_balanced() -> None:
    assert load_entropy(torch.tensor([[5.0], [0.0]])).nan_to_num(-1.0).tolist() == [1.0, -1.0]


def test_group_entropy_has_one_value_per_layer_and_group() -> None:
    group_loads = torch.zeros(2, 6, 4)
    group_loads[:, 0] = 1.0
    values = load_entropy(group_loads)
    assert values.shape == (2, 6)
    assert torch.allclose(values[:, 0], torch.ones(2, dtype=torch.float64)) and values[:, 1:].isnan().all()


def test_overlap_of_the_busiest_quarter_is_intersection_over_union() -> None:
    loads = torch.zeros(1, 3, 8)
    loads[0, 0, :2] = torch.tensor([9.0, 8.0])
    loads[0, 1, 1:3] = torch.tensor([9.0, 8.0])
    overlap = group_overlap(loads)
    assert overlap[0, 0, 0] == 1.0
    assert math.isclose(overlap[0, 0, 1].item(), 1 / 3)
    assert overlap[0, 0, 1] == overlap[0, 1, 0]
    assert overlap[0, 2].isnan().all() and overlap[0, :, 2].isnan().all()


def test_overlap_of_random_groups_is_near_the_chance_of_the_report() -> None:
    generator = torch.Generator().manual_seed(0)
    overlap = group_overlap(torch.rand(200, 2, 64, generator=generator))[:, 0, 1].mean()
    assert abs(overlap.item() - 0.143) < 0.02  # 200 draws with a spread of about 0.06 each


def test_the_spread_of_the_bias_is_per_layer() -> None:
    assert bias_spread(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 3.0]])).tolist() == [2.0, 3.0]
