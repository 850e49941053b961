"""How close decoded speech is to the original: log-mel distance, and short-time objective intelligibility."""

from __future__ import annotations

import torch
from torch.nn import functional

from ernie5.tokenizers.audio.mel import AMPLITUDE_FLOOR, SAMPLE_RATE, LogMel, amplitude, short_time_spectrum

STOI_BANDS = 15
STOI_LOWEST_HERTZ = 150.0
STOI_WINDOW = 512
# 24 frames of 16 ms: segments of 384 ms, as in the paper.
STOI_SEGMENT_FRAMES = 24
STOI_CLIP = 1.0 + 10.0 ** (15.0 / 20.0)


def log_mel_distance(waveform: torch.Tensor, *, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of 80-band log-mels (window 1024, hop 256) in nepers, per row: [B].

    waveform, target [B, S] fp32. One neper is 8.7 dB.
    """
    mel = LogMel(80, fft_size=1024, hop=256).to(target.device)
    return (mel(waveform) - mel(target)).abs().mean((1, 2))


def intelligibility(waveform: torch.Tensor, *, target: torch.Tensor) -> float:
    """STOI of waveform [S] against the clean target [S]: correlation of third-octave envelopes over 384 ms segments,
    one for identical speech (Taal et al. 2011; here on 16 kHz frames of 32 ms every 16 ms, the same bands).

    Frames 40 dB under the loudest are dropped; with less than one segment left the result is NaN.
    """
    bands = _octave_bands().to(target.device)
    clean, degraded = _envelopes(target, bands=bands), _envelopes(waveform, bands=bands)
    loudness = clean.square().sum(0)
    spoken = loudness > loudness.max() * 1e-4
    clean, degraded = clean[:, spoken], degraded[:, spoken]
    if clean.shape[1] < STOI_SEGMENT_FRAMES:
        return float("nan")
    clean = clean.unfold(1, STOI_SEGMENT_FRAMES, 1)
    degraded = degraded.unfold(1, STOI_SEGMENT_FRAMES, 1)
    gain = clean.norm(dim=2, keepdim=True) / degraded.norm(dim=2, keepdim=True).clamp(min=AMPLITUDE_FLOOR)
    degraded = torch.minimum(degraded * gain, clean * STOI_CLIP)
    clean = clean - clean.mean(2, keepdim=True)
    degraded = degraded - degraded.mean(2, keepdim=True)
    return float(functional.cosine_similarity(clean, degraded, dim=2).mean())


def _envelopes(waveform: torch.Tensor, *, bands: torch.Tensor) -> torch.Tensor:
    window = torch.hann_window(STOI_WINDOW, device=waveform.device)
    spectrum = short_time_spectrum(waveform[None], fft_size=STOI_WINDOW, hop=STOI_WINDOW // 2, window=window)
    return (bands @ amplitude(spectrum)[0].square()).sqrt()


def _octave_bands() -> torch.Tensor:
    """Indicator [15, bins] of third-octave bands from 150 Hz."""
    hertz = torch.arange(STOI_WINDOW // 2 + 1) * (SAMPLE_RATE / STOI_WINDOW)
    centre = STOI_LOWEST_HERTZ * 2.0 ** (torch.arange(STOI_BANDS)[:, None] / 3.0)
    return ((hertz >= centre * 2.0 ** (-1 / 6)) & (hertz < centre * 2.0 ** (1 / 6))).float()
