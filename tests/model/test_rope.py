"""Uni-RoPE: the channel split of SPEC section 1, its 1-D reduction, and relative positions."""

from __future__ import annotations

import pytest
import torch

from ernie5.model.rope import axes_of_frequencies, rotary_angles, rotation, temporal_frequencies
from ernie5_kernels.rope3d import rope3d


@pytest.mark.parametrize(("frequencies", "temporal"), [(64, 20), (32, 10), (16, 6), (8, 2)])
def test_the_number_of_temporal_frequencies_is_that_of_the_specification(frequencies: int, temporal: int) -> None:
    assert temporal_frequencies(frequencies) == temporal


@pytest.mark.parametrize("frequencies", range(2, 80))
def test_every_frequency_has_one_axis_and_height_and_width_get_equally_many(frequencies: int) -> None:
    axes = axes_of_frequencies(frequencies)
    assert len(axes) == frequencies
    assert axes.count(1) == axes.count(2)


def test_equal_axes_reduce_to_one_dimensional_rotation() -> None:
    running = torch.arange(9, dtype=torch.float64).view(1, 9, 1).expand(1, 9, 3)
    angles = rotary_angles(running, head_width=16, base=100.0)
    plain = torch.arange(9, dtype=torch.float64).unsqueeze(1) * 100.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    assert torch.allclose(angles[0], plain, atol=1e-12)


def test_scores_depend_on_differences_of_positions_alone_and_on_every_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 16, generator=generator, dtype=torch.float64) for _ in range(2))

    def score(at: list[float], other: list[float]) -> torch.Tensor:
        turned = [
            rope3d(x, rotation=rotation(torch.tensor([[p]], dtype=torch.float64), head_width=16, base=1e4))
            for x, p in ((query, at), (key, other))
        ]
        return (turned[0] * turned[1]).sum()

    base = score([5.0, 2.5, 3.0], [1.0, 1.0, 1.0])
    assert torch.allclose(base, score([6.0, 9.5, 3.25], [2.0, 8.0, 1.25]), atol=1e-12)
    for shifted in ([6.0, 2.5, 3.0], [5.0, 3.5, 3.0], [5.0, 2.5, 4.0]):
        assert not torch.allclose(base, score(shifted, [1.0, 1.0, 1.0]))
