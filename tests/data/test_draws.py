"""Random draws keyed by what they are for."""

from __future__ import annotations

import torch

from ernie5.data.draws import torch_seed


def test_a_seed_that_a_generator_takes_whole_is_left_as_it_is_and_no_bit_of_a_larger_one_is_lost() -> None:
    assert [torch_seed(seed) for seed in (0, 7, 2**32 - 1)] == [0, 7, 2**32 - 1]
    large = [torch_seed(7 + 2**bit) for bit in range(32, 63)]
    assert len({7, *large}) == 32 and all(0 <= seed < 2**32 for seed in large)
    draws = {torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() for seed in (7, *large)}
    assert len(draws) == 32
