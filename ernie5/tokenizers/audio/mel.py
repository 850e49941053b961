"""Short-time spectra and log-mel features of 16 kHz speech, and the speaker feature that conditions speech synthesis.

Everything is built on `torch.stft`; frames are centred on hop-long cells of the signal and the edges are padded with
zeros, so that S samples give exactly ceil(S / hop) frames whatever S is, one sample included.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from ernie5.errors import TokenizerError

SAMPLE_RATE = 16_000
SPEAKER_BANDS = 80
# Amplitudes below 1e-5 of full scale (-100 dB) are quieter than 16-bit dither and carry no speech.
AMPLITUDE_FLOOR = 1e-5
# Frames 40 dB under the loudest one are pauses; they would drag the speaker's statistics towards the room.
SILENCE_RANGE_NEPERS = 40.0 * math.log(10.0) / 20.0
SPEAKER_MEAN, SPEAKER_DEVIATION, SPEAKER_SPREAD = -7.7, 1.5, 0.4
"""Band mean, band deviation and spread of deviations over voices, in nepers, of the sample corpus' training speech."""


def hertz_to_mel(hertz: torch.Tensor) -> torch.Tensor:
    """Mel scale 2595 log10(1 + f/700) (O'Shaughnessy 1987); any shape, Hz in, mel out."""
    return 2595.0 * torch.log10(1.0 + hertz / 700.0)


def mel_to_hertz(mel: torch.Tensor) -> torch.Tensor:
    """Inverse of `hertz_to_mel`."""
    return 700.0 * (torch.pow(10.0, mel / 2595.0) - 1.0)


def mel_filterbank(bands: int, *, fft_size: int, sample_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Triangular filters of equal mel width from 0 Hz to the Nyquist frequency, each summing to one.

    Returns [bands, fft_size // 2 + 1] fp32. With filters that sum to one a band's value is a mean amplitude, so that
    flat spectra give flat features. A filter narrower than the bin spacing takes the bin nearest its centre.
    """
    bins_hertz = torch.arange(fft_size // 2 + 1, dtype=torch.float64) * (sample_rate / fft_size)
    nyquist_mel = hertz_to_mel(torch.tensor(sample_rate / 2.0, dtype=torch.float64))
    corners = mel_to_hertz(torch.linspace(0.0, 1.0, bands + 2, dtype=torch.float64) * nyquist_mel)
    lower, centre, upper = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (bins_hertz - lower) / (centre - lower)
    falling = (upper - bins_hertz) / (upper - centre)
    filters = torch.minimum(rising, falling).clamp(min=0.0)
    empty = filters.sum(1) < 1e-6
    nearest = (corners[1:-1] * fft_size / sample_rate).round().long().clamp(max=fft_size // 2)
    filters[empty, nearest[empty]] = 1.0
    return (filters / filters.sum(1, keepdim=True)).float()


def short_time_spectrum(waveform: torch.Tensor, *, fft_size: int, hop: int, window: torch.Tensor) -> torch.Tensor:
    """Complex spectrum of waveform [B, S] with a given window [fft_size]: [B, fft_size // 2 + 1, ceil(S / hop)].

    Divided by the window's sum, so that a full-scale sinusoid has amplitude one half whatever the size.
    """
    num_frames = -(-waveform.shape[1] // hop)
    left = (fft_size - hop) // 2
    right = (num_frames - 1) * hop + fft_size - left - waveform.shape[1]
    padded = functional.pad(waveform, (left, right))
    spectrum = torch.stft(
        padded, fft_size, hop_length=hop, window=window, center=False, onesided=True, return_complex=True
    )
    return spectrum / window.sum()


def amplitude(spectrum: torch.Tensor) -> torch.Tensor:
    """Modulus of a complex tensor with a finite gradient at zero, where that of `abs` is not usable."""
    parts = torch.view_as_real(spectrum)
    return (parts.square().sum(-1) + 1e-14).sqrt()


class LogMel(nn.Module):
    """Natural logarithm of mel-band amplitudes. Its constants follow the module's device and are never saved."""

    def __init__(self, bands: int, *, fft_size: int, hop: int, sample_rate: int = SAMPLE_RATE) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.hop = hop
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        filters = mel_filterbank(bands, fft_size=fft_size, sample_rate=sample_rate)
        self.register_buffer("filters", filters, persistent=False)

    def spectrum(self, waveform: torch.Tensor) -> torch.Tensor:
        """Amplitudes [B, fft_size // 2 + 1, ceil(S / hop)] of waveform [B, S] fp32."""
        return amplitude(
            short_time_spectrum(waveform, fft_size=self.fft_size, hop=self.hop, window=self.window)
        )

    def from_spectrum(self, amplitudes: torch.Tensor) -> torch.Tensor:
        """Log-mel [B, bands, frames] in nepers from the amplitudes of `spectrum`, floored at 1e-5 of full scale.
        Always in fp32: three digits of bf16 would be heard."""
        with torch.autocast(amplitudes.device.type, enabled=False):
            return torch.log((self.filters @ amplitudes).clamp(min=AMPLITUDE_FLOOR))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Log-mel [B, bands, ceil(S / hop)] fp32 in nepers of waveform [B, S] fp32 in [-1, 1]."""
        return self.from_spectrum(self.spectrum(waveform))


def speaker_features(waveform: torch.Tensor) -> torch.Tensor:
    """Who speaks, roughly: per-band mean and standard deviation of an 80-band log-mel over frames with speech.

    waveform [B, samples] fp32, 16 kHz; returns [B, 160] fp32: 80 means, then 80 standard deviations, centred on usual
    speech and of like spread, so that what voices share does not drown what tells them apart. A frame
    counts as speech if its mean amplitude is within 40 dB of the loudest frame's; pure silence counts whole. Raises
    TokenizerError for zero samples or another rank than two.
    """
    check_waveform(waveform, purpose="speaker features")
    mel = LogMel(SPEAKER_BANDS, fft_size=512, hop=160).to(waveform.device)
    amplitudes = mel.spectrum(waveform.float())
    log_mel = mel.from_spectrum(amplitudes)
    loudness = torch.log(amplitudes.mean(1).clamp(min=AMPLITUDE_FLOOR))
    spoken = (loudness >= loudness.amax(1, keepdim=True) - SILENCE_RANGE_NEPERS).float()[:, None]
    count = spoken.sum(2)
    mean = (log_mel * spoken).sum(2) / count
    variance = ((log_mel - mean[:, :, None]).square() * spoken).sum(2) / count
    return torch.cat([mean - SPEAKER_MEAN, (variance.sqrt() - SPEAKER_DEVIATION) / SPEAKER_SPREAD], dim=1)


def check_waveform(waveform: torch.Tensor, *, purpose: str) -> None:
    """Raises TokenizerError unless `waveform` is [B, samples] with B >= 1, samples >= 1 and only finite values."""
    shape = tuple(waveform.shape)
    if waveform.dim() != 2 or 0 in shape:
        raise TokenizerError(
            f"waveform of shape {shape} cannot give {purpose}. The rule is [rows, samples] with at least one row and "
            f"one sample at {SAMPLE_RATE} Hz. Drop empty clips before this call."
        )
    if not bool(torch.isfinite(waveform).all()):
        raise TokenizerError(
            f"waveform of shape {shape} holds NaN or infinite samples and cannot give {purpose}. Samples must be "
            f"finite, within [-1, 1]. Check how the clip was decoded."
        )
