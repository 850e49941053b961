"""Quality figures: known values for equal, louder, noisy and silent speech."""

import math

import pytest
import torch

from ernie5.tokenizers.audio.quality import intelligibility, log_mel_distance


def modulated_noise(samples: int = 32_000) -> torch.Tensor:
    """Noise with a 4 Hz envelope, the rate of syllables: what intelligibility measures."""
    carrier = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    return 0.1 * carrier * (1.1 + torch.sin(2 * math.pi * 4 * torch.arange(samples) / 16_000))


def test_the_distance_is_zero_for_equal_speech_and_log_two_for_twice_the_amplitude():
    speech = modulated_noise()[None]
    assert float(log_mel_distance(speech, target=speech)) == 0.0
    assert float(log_mel_distance(2 * speech, target=speech)) == pytest.approx(math.log(2), rel=1e-4)


def test_the_distance_is_given_per_row():
    speech = modulated_noise()[None]
    distances = log_mel_distance(torch.cat([speech, 2 * speech]), target=speech.repeat(2, 1))
    assert distances[0] == 0 and distances[1] > 0.5


def test_intelligibility_is_one_for_speech_at_any_level_and_falls_with_noise():
    speech = modulated_noise()
    other = 0.1 * torch.randn(len(speech), generator=torch.Generator().manual_seed(1))
    assert intelligibility(0.3 * speech, target=speech) == pytest.approx(1.0, abs=1e-3)
    little, much = (intelligibility(speech + scale * other, target=speech) for scale in (0.3, 3.0))
    assert 1.0 > little > much
    assert intelligibility(other, target=speech) < 0.3


def test_a_clip_shorter_than_one_segment_has_no_intelligibility():
    assert math.isnan(intelligibility(modulated_noise(3000), target=modulated_noise(3000)))


def test_silence_in_place_of_speech_is_not_intelligible():
    speech = modulated_noise()
    assert abs(intelligibility(torch.zeros_like(speech), target=speech)) < 0.05
