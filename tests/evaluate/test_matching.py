"""Nearest-target tests: distances and the choice of another target."""

from __future__ import annotations

import pytest
import torch

from ernie5.evaluate import matching


@pytest.mark.parametrize("count", [2, 3, 100])
def test_the_other_item_is_never_the_item_itself(count: int) -> None:
    others = matching.other_indices(count, seed=3)
    assert len(others) == count and all(0 <= o < count and o != i for i, o in enumerate(others))


def test_every_bit_of_a_seed_counts() -> None:
    drawn = [matching.other_indices(1000, seed=seed) for seed in (3, 3 + 2**32, 3 + 2**62)]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_warping_forgives_a_slower_speaker_but_not_another_sentence() -> None:
    word = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    slow = word.repeat_interleave(2, dim=0)
    stranger = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    assert matching.sequence_distance(word, right=word) == 0.0
    assert matching.sequence_distance(word, right=slow) == 0.0
    assert matching.sequence_distance(word, right=stranger) > 0.5
    assert matching.sequence_distance(word[:0], right=word) == float("inf")


def test_warping_equals_the_cell_by_cell_recurrence() -> None:
    left, right = torch.randn(4, 3), torch.randn(6, 3)
    cost, best = torch.cdist(left.double(), right.double()), {}
    for i in range(4):
        for j in range(6):
            steps = [best[i - 1, j] + cost[i, j]] if i else []
            steps += [best[i, j - 1] + cost[i, j]] if j else []
            steps += [best[i - 1, j - 1] + 2 * cost[i, j]] if i and j else []
            best[i, j] = min(steps) if steps else 2 * cost[0, 0]
    assert matching.sequence_distance(left, right=right) == pytest.approx(float(best[3, 5]) / 10)


def test_ties_count_half() -> None:
    assert matching.own_is_nearer([1.0, 2.0, 3.0], other=[2.0, 2.0, 1.0]) == 0.5
    assert matching.own_is_nearer([], other=[]) == 0.0
