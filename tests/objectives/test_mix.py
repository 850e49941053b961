"""Normalisation, running magnitudes and the reported loss."""

from __future__ import annotations

import math

import pytest
import torch

from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import combine, mean_losses, uniform_magnitudes, update_magnitudes, weighted_loss
from ernie5.records import LossTerms, TargetCounts


def make_terms(text: float, image: float, video: float, audio: float, mtp: float) -> LossTerms:
    return LossTerms(*(torch.tensor(value) for value in (text, image, video, audio, mtp)))


def make_counts(*values: float) -> TargetCounts:
    return TargetCounts(*(torch.tensor(value, dtype=torch.float64) for value in values))


def test_an_absent_modality_neither_moves_its_magnitude_nor_counts_in_the_loss() -> None:
    counts = make_counts(10, 0, 0, 3, 3, 50)
    means = mean_losses(make_terms(20.0, 0.0, 0.0, 6.0, 9.0), counts=counts)
    before = torch.tensor([4.0, 0.7, 0.6, 3.0], dtype=torch.float64)
    after = update_magnitudes(before, means=means, decay=0.75, floor=torch.zeros(4))
    assert after.tolist() == pytest.approx([0.75 * 4 + 0.25 * 2, 0.7, 0.6, 0.75 * 3 + 0.25 * 2])
    config = ObjectivesConfig(audio_weight=0.5)
    assert float(weighted_loss(means, counts=counts, config=config)) == pytest.approx(2.0 + 0.5 * 2.0)
    assert math.isnan(float(means.image))


def test_a_loss_that_is_nan_is_not_taken_for_an_absent_one() -> None:
    """The log said "loss 0.0000" of a step whose losses were NaN, and less than before where one of them was."""
    counts = make_counts(10, 4, 0, 3, 3, 50)
    means = mean_losses(make_terms(20.0, math.nan, 0.0, 6.0, 9.0), counts=counts)
    assert math.isnan(float(weighted_loss(means, counts=counts, config=ObjectivesConfig())))


def test_a_magnitude_ignores_a_loss_that_is_not_finite() -> None:
    means = mean_losses(make_terms(math.inf, 1.0, 1.0, 1.0, 1.0), counts=make_counts(1, 1, 1, 1, 1, 1))
    before = torch.ones(4, dtype=torch.float64)
    assert torch.isfinite(update_magnitudes(before, means=means, decay=0.9, floor=torch.zeros(4))).all()


def test_a_magnitude_does_not_fall_below_its_floor() -> None:
    means = mean_losses(make_terms(1.0, 0.5, 0.5, 0.1, 1.0), counts=make_counts(1, 1, 1, 1, 1, 1))
    before = torch.tensor([4.0, 0.7, 0.7, 3.0], dtype=torch.float64)
    after = update_magnitudes(before, means=means, decay=0.5, floor=torch.tensor([3.0, 0.1, 0.1, 3.0]).double())
    assert after.tolist() == pytest.approx([3.0, 0.6, 0.6, 3.0])


def test_the_objective_is_each_mean_over_its_magnitude_times_its_weight() -> None:
    terms, counts = make_terms(20.0, 8.0, 4.0, 6.0, 9.0), make_counts(10, 4, 8, 3, 3, 50)
    divisors = torch.tensor([4.0, 0.5, 0.25, 2.0], dtype=torch.float64)
    config = ObjectivesConfig(image_weight=2.0, mtp_weight=0.3)
    expected = 2 / 4 + 2 * 2 / 0.5 + 0.5 / 0.25 + 2 / 2 + 0.3 * 3 / 4
    assert float(combine(terms, counts=counts, divisors=divisors, config=config)) == pytest.approx(expected)
    plain = ObjectivesConfig(rescale=False, mtp_weight=0.0)
    assert float(combine(terms, counts=counts, divisors=divisors, config=plain)) == pytest.approx(2 + 2 + 0.5 + 2)


def test_a_step_without_any_target_has_a_finite_objective() -> None:
    terms, counts = make_terms(0.0, 0.0, 0.0, 0.0, 0.0), make_counts(0, 0, 0, 0, 0, 0)
    value = combine(terms, counts=counts, divisors=torch.zeros(4, dtype=torch.float64), config=ObjectivesConfig())
    assert float(value) == 0.0


def test_magnitudes_start_at_the_loss_of_even_guesses() -> None:
    values = uniform_magnitudes(vocab_size=4160, audio_codes=1024).tolist()
    assert values == pytest.approx([math.log(4160), math.log(2), math.log(2), math.log(1025)])
