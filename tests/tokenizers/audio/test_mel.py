"""Log-mel features and the speaker feature against scipy, closed forms, and hostile waveforms."""

import math

import numpy as np
import pytest
import scipy.signal
import torch

from ernie5.errors import TokenizerError
from ernie5.tokenizers.audio.mel import (
    AMPLITUDE_FLOOR,
    SPEAKER_DEVIATION,
    SPEAKER_SPREAD,
    LogMel,
    hertz_to_mel,
    mel_filterbank,
    mel_to_hertz,
    short_time_spectrum,
    speaker_features,
)


def tone(hertz: float, *, samples: int = 16_000, amplitude: float = 0.5) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(samples) / 16_000)[None]


def test_the_mel_scale_puts_1000_hz_at_1000_mel_and_inverts():
    hertz = torch.tensor([0.0, 100.0, 1000.0, 8000.0], dtype=torch.float64)
    mel = hertz_to_mel(hertz)
    # 2595 log10(1 + 1000/700) = 999.99, by construction of the scale.
    assert mel[2] == pytest.approx(1000.0, abs=0.05)
    torch.testing.assert_close(mel_to_hertz(mel), hertz)


@pytest.mark.parametrize("bands, fft_size", [(80, 640), (80, 256), (160, 2048), (1, 16)])
def test_every_filter_sums_to_one_and_centres_ascend(bands, fft_size):
    filters = mel_filterbank(bands, fft_size=fft_size)
    assert filters.shape == (bands, fft_size // 2 + 1)
    assert (filters >= 0).all()
    torch.testing.assert_close(filters.sum(1), torch.ones(bands))
    centres = filters @ torch.arange(fft_size // 2 + 1.0)
    assert (centres.diff() >= 0).all()


def test_short_time_spectra_equal_scipy():
    waveform = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
    fft_size, hop = 512, 128
    ours = short_time_spectrum(waveform, fft_size=fft_size, hop=hop, window=torch.hann_window(fft_size))
    left = (fft_size - hop) // 2
    right = (ours.shape[2] - 1) * hop + fft_size - left - 4000
    padded = np.pad(waveform[0].double().numpy(), (left, right))
    _, _, theirs = scipy.signal.stft(
        padded, window="hann", nperseg=fft_size, noverlap=fft_size - hop, boundary=None, padded=False
    )
    # scipy's default scaling divides by the window's sum too; fp32 transforms of unit noise err by about 1e-7.
    np.testing.assert_allclose(ours[0].numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize("hertz", [250.0, 1000.0, 4000.0])
def test_a_tone_peaks_in_its_own_band_at_its_own_level(hertz):
    mel = LogMel(80, fft_size=1024, hop=256)
    features = mel(tone(hertz))[0, :, 10:-10].mean(1)
    centres = mel.filters @ torch.arange(513.0) * 16_000 / 1024
    assert abs(int(features.argmax()) - int((centres - hertz).abs().argmin())) <= 1
    amplitude = mel.spectrum(tone(hertz))[0, :, 30].max()
    # A sinusoid of amplitude a has a spectral line of a/2; these three fall on bins exactly.
    assert float(amplitude) == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("samples", [1, 63, 160, 161, 12_800])
def test_frames_are_the_samples_over_the_hop_rounded_up(samples):
    assert LogMel(20, fft_size=640, hop=160)(torch.ones(2, samples)).shape == (2, 20, -(-samples // 160))


def test_doubling_the_amplitude_adds_the_logarithm_of_two():
    noise = 0.1 * torch.randn(1, 3200, generator=torch.Generator().manual_seed(2))
    mel = LogMel(80, fft_size=640, hop=160)
    torch.testing.assert_close(mel(2 * noise) - mel(noise), torch.full((1, 80, 20), math.log(2)))


def test_silence_is_the_floor_and_has_a_finite_gradient():
    silence = torch.zeros(1, 1600, requires_grad=True)
    features = LogMel(80, fft_size=640, hop=160)(silence)
    torch.testing.assert_close(features, torch.full_like(features, math.log(AMPLITUDE_FLOOR)))
    features.sum().backward()
    assert torch.isfinite(silence.grad).all()


def test_speaker_features_hold_means_and_deviations_and_ignore_pauses():
    speech = 0.1 * torch.randn(1, 16_000, generator=torch.Generator().manual_seed(3))
    features = speaker_features(speech)
    with_pause = speaker_features(torch.cat([speech, torch.zeros(1, 16_000)], dim=1))
    assert features.shape == (1, 160)
    # Two frames of 101 straddle the border, up to 4 nepers lower; with the whole pause the means fall by 4 nepers.
    # Deviations count 1 / SPEAKER_SPREAD = 2.5 times.
    torch.testing.assert_close(features, with_pause, atol=0.25, rtol=0)
    assert (features[:, 80:] > -SPEAKER_DEVIATION / SPEAKER_SPREAD).all()  # that is a deviation of zero


def test_speaker_features_tell_a_low_voice_from_a_high_one_more_than_two_halves_of_one_voice():
    low = sum(tone(110.0 * k, samples=32_000, amplitude=0.3 / k) for k in range(1, 20))
    high = sum(tone(230.0 * k, samples=32_000, amplitude=0.3 / k) for k in range(1, 20))
    first, second, other = (speaker_features(x) for x in (low[:, :16_000], low[:, 16_000:], high[:, :16_000]))
    assert (first - other).norm() > 5 * (first - second).norm()


def test_speaker_features_do_not_depend_on_the_other_rows_of_the_batch():
    rows = torch.randn(3, 5000, generator=torch.Generator().manual_seed(4)) * torch.tensor([[1.0], [0.01], [0.0]])
    together = speaker_features(rows)
    alone = torch.cat([speaker_features(row[None]) for row in rows])
    torch.testing.assert_close(together, alone)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize(
    "waveform, said",
    [
        (torch.zeros(1, 0), "(1, 0)"),
        (torch.zeros(0, 100), "(0, 100)"),
        (torch.zeros(100), "(100,)"),
        (torch.full((1, 100), float("nan")), "NaN"),
    ],
)
def test_waveforms_that_hold_no_sound_are_refused_with_their_shape(waveform, said):
    with pytest.raises(TokenizerError, match="waveform of shape") as caught:
        speaker_features(waveform)
    assert said in str(caught.value)
