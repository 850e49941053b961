"""Corrupted history: probabilities of the SPEC, re-quantised targets, loss weights."""

from __future__ import annotations

import pytest
import torch

from ernie5.data.config import CorruptionConfig
from ernie5.data.corrupt import encode_scales, flip_probabilities
from ernie5.data.drawing import draw_codes, scale_weights
from ernie5.data.draws import draws_of, key_of, permutation_of, torch_draws_of
from ernie5.tokenizers.visual.quantizer import accumulate, bits_to_values, quantize_bits
from ernie5.tokenizers.visual.scales import resize_to, scale_schedule

SCHEDULE = scale_schedule(8, 8)


def _latents(frames: int) -> torch.Tensor:
    return torch.randn(16, frames, 8, 8, generator=torch.Generator().manual_seed(1))


def test_probabilities_stay_between_their_bounds_and_a_frame_starts_as_the_last_one_ended() -> None:
    config = CorruptionConfig()
    for seed in range(50):
        drawn = flip_probabilities(40, num_scales=6, config=config, generator=torch_draws_of("p", seed))
        low = 0.01 * torch.arange(40)[:, None]
        assert (drawn[:, 1:] >= low.clamp(max=0.5) - 1e-6).all()
        assert (drawn[:, 1:] <= (0.25 + low).clamp(max=0.5) + 1e-6).all()
        assert torch.equal(drawn[1:, 0], drawn[:-1, -1])


def test_without_corruption_targets_are_the_plain_residual_bits() -> None:
    latents = _latents(1)
    codes = encode_scales(latents, schedule=SCHEDULE, config=None, generator=torch.Generator())
    total = torch.zeros(1, 16, 8, 8)
    for grid, bits, inputs in zip(SCHEDULE, codes.targets, codes.inputs, strict=True):
        assert torch.allclose(inputs.movedim(-1, 1), resize_to(total, grid), atol=1e-6)
        assert torch.equal(bits, quantize_bits(resize_to(latents.movedim(1, 0) - total, grid).movedim(1, -1)))
        total = accumulate(total, bits)
    assert torch.allclose(codes.finished.movedim(-1, 1), total, atol=1e-6)


def test_later_targets_are_quantised_against_the_corrupted_sum() -> None:
    latents, config = _latents(1), CorruptionConfig()
    codes = encode_scales(latents, schedule=SCHEDULE, config=config, generator=torch_draws_of("c"))
    plain = encode_scales(latents, schedule=SCHEDULE, config=None, generator=torch_draws_of("c"))
    assert torch.equal(codes.targets[0], plain.targets[0])
    flipped = codes.inputs[1][0, 0, 0] != bits_to_values(codes.targets[0])[0, 0, 0]
    assert flipped.any() or not torch.equal(codes.finished, plain.finished)
    assert not torch.equal(codes.targets[-1], plain.targets[-1])
    for k, grid in enumerate(SCHEDULE[1:], start=1):
        if k == len(SCHEDULE) - 1:
            residual = latents.movedim(1, 0) - codes.inputs[k].movedim(-1, 1)
            assert grid == (8, 8) and torch.equal(codes.targets[k], quantize_bits(residual.movedim(1, -1)))


def test_corruption_switched_off_equals_none() -> None:
    off = CorruptionConfig(enabled=False)
    one, two = (
        encode_scales(_latents(2), schedule=SCHEDULE, config=c, generator=torch.Generator()) for c in (off, None)
    )
    assert torch.equal(one.finished, two.finished)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (8, 8), (4, 8), (3, 7)])
def test_weights_fall_with_the_scale_and_average_one_over_the_cells(grid: tuple[int, int]) -> None:
    schedule = scale_schedule(*grid)
    weights = scale_weights(schedule)
    areas = [height * width for height, width in schedule]
    assert sum(w * a for w, a in zip(weights, areas, strict=True)) / sum(areas) == pytest.approx(1.0)
    assert list(weights) == sorted(weights, reverse=True)
    assert weights[0] / weights[-1] == pytest.approx(areas[-1] ** 0.5)


def test_a_single_cell_picture_has_a_first_scale_and_a_finished_cell() -> None:
    codes = encode_scales(torch.ones(4, 1, 1, 1), schedule=((1, 1),), config=None, generator=torch.Generator())
    drawing = draw_codes(codes, schedule=((1, 1),), num_scales=6)
    assert drawing.plan.scales.tolist() == [6] and drawing.plan.starts.tolist() == [0]
    assert drawing.plan.bit_rows.tolist() == [-1] and drawing.plan.bit_scales.tolist() == [0]


def test_a_clip_of_one_scale_predicts_each_frame_from_the_finished_one_before() -> None:
    codes = encode_scales(torch.ones(4, 3, 1, 1), schedule=((1, 1),), config=None, generator=torch.Generator())
    plan = draw_codes(codes, schedule=((1, 1),), num_scales=6).plan
    assert plan.bit_rows.tolist() == [-1, 0, 1] and plan.places[:, 0].tolist() == [0, 1, 2]


def test_a_clip_of_one_scale_is_corrupted_alike_in_every_frame() -> None:
    drawn = flip_probabilities(5, num_scales=1, config=CorruptionConfig(), generator=torch_draws_of("p"))
    assert (drawn == drawn[0]).all() and 0 < drawn[0] <= 0.25
    latents = torch.ones(4, 5, 1, 1)
    codes = encode_scales(latents, schedule=((1, 1),), config=CorruptionConfig(), generator=torch_draws_of("c"))
    assert codes.finished.shape == (5, 1, 1, 4)


def test_keys_tell_numbers_from_texts_and_orders_apart() -> None:
    assert len({key_of("a", 1), key_of("a", "1"), key_of(1, "a"), key_of("a1"), key_of("a", 1, "")}) == 5
    assert draws_of("x", 1).random() == draws_of("x", 1).random() != draws_of("x", 2).random()
    assert sorted(permutation_of(10, "p", 0)) == list(range(10))
