"""Losses of the audio codec: spectra at several resolutions, the semantic teacher of level 1, the discriminators."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from ernie5.tokenizers.audio.mel import LogMel, short_time_spectrum
from ernie5.tokenizers.config import TEACHER_STEPS

# (window, bands): short windows hear onsets, long ones hear pitch. Hops are a quarter of the window.
MEL_RESOLUTIONS = ((1024, 80), (512, 40), (256, 20))
# Bins count half: most of a linear spectrum's bins are above 4 kHz, where little of the speech is.
BIN_WEIGHT = 0.5
BIN_FLOOR = 1e-4
CEPSTRA = 24


class SpectralLoss(nn.Module):
    """L1 of log-mel bands, plus L1 of log amplitudes and of amplitudes over their mean (spectral convergence in L1),
    averaged over three resolutions (Yamamoto et al. 2020; Kumar et al. 2023 for the log-mel family)."""

    def __init__(self, *, sample_rate: int) -> None:
        super().__init__()
        self.mels = nn.ModuleList(
            LogMel(bands, fft_size=size, hop=size // 4, sample_rate=sample_rate) for size, bands in MEL_RESOLUTIONS
        )

    def forward(self, waveform: torch.Tensor, *, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-mel, linear) 0-d losses in nepers of waveform [B, S] against target [B, S]."""
        mel_loss, bin_loss = waveform.new_zeros(()), waveform.new_zeros(())
        for mel in self.mels:
            ours = mel.spectrum(waveform)
            with torch.no_grad():
                theirs = mel.spectrum(target)
                their_mel = mel.from_spectrum(theirs)
            mel_loss = mel_loss + functional.l1_loss(mel.from_spectrum(ours), their_mel)
            logs = functional.l1_loss(torch.log(ours + BIN_FLOOR), torch.log(theirs + BIN_FLOOR))
            converged = (ours - theirs).abs().mean() / theirs.mean().clamp(min=BIN_FLOOR)
            bin_loss = bin_loss + BIN_WEIGHT * (logs + converged)
        return mel_loss / len(self.mels), bin_loss / len(self.mels)


class SemanticTeacher(nn.Module):
    """Phonetic features of a waveform, what level 1 is taught to tell: liftered cepstra of the log-mel, pooled over
    each codec frame and its two halves, mean-normalised per clip.

    Low cepstra (all but the loudness) describe the vocal tract rather than the pitch, and the clip's mean carries the
    speaker and the microphone (Furui 1981); what is left is mostly which sound is spoken.
    """

    def __init__(self, *, sample_rate: int, samples_per_frame: int) -> None:
        super().__init__()
        bands = 40
        self.hop = samples_per_frame // TEACHER_STEPS
        self.log_mel = LogMel(bands, fft_size=4 * self.hop, hop=self.hop, sample_rate=sample_rate)
        order = torch.arange(1, CEPSTRA + 1)[:, None]
        place = (torch.arange(bands)[None] + 0.5) / bands
        # The raised-sine lifter brings cepstra, which fall off with their order, to one size (Juang et al. 1987).
        lifter = 1.0 + 0.5 * CEPSTRA * torch.sin(math.pi * order / CEPSTRA)
        basis = torch.cos(math.pi * order * place) * lifter / bands
        self.register_buffer("basis", basis, persistent=False)

    @property
    def width(self) -> int:
        """Numbers per codec frame: the mean of its cepstra, and the second half's minus the first half's."""
        return 2 * CEPSTRA

    @torch.no_grad()
    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Features [B, T, width] of waveform [B, T samples_per_frame], each feature of unit variance in a clip."""
        cepstra = (self.basis @ self.log_mel(waveform)).transpose(1, 2)
        halves = cepstra.reshape(cepstra.shape[0], -1, 2, TEACHER_STEPS // 2, CEPSTRA).mean(3)
        features = torch.cat([halves.mean(2), halves[:, :, 1] - halves[:, :, 0]], dim=2)
        features = features - features.mean(1, keepdim=True)
        return features / features.std(1, keepdim=True).clamp(min=0.1)


def semantic_loss(predicted: torch.Tensor, *, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error plus one minus the cosine, per frame; both [B, T, width]."""
    cosine = functional.cosine_similarity(predicted, teacher, dim=2)
    return functional.mse_loss(predicted, teacher) + (1.0 - cosine).mean()


class SpectrumDiscriminator(nn.Module):
    """Judges patches of one complex spectrogram: strided 2-D convolutions over (bin, frame) of real and imaginary
    parts (Jang et al. 2021; Defossez et al. 2022), with amplitudes compressed to the power 0.3."""

    def __init__(self, fft_size: int, *, channels: int = 16) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        shapes = ((2, channels, (4, 1)), (channels, 2 * channels, (2, 2)), (2 * channels, 2 * channels, (2, 1)))
        norm = nn.utils.parametrizations.weight_norm
        self.layers = nn.ModuleList(
            norm(nn.Conv2d(before, after, (7, 3) if before == 2 else (5, 3), stride=stride, padding="valid"))
            for before, after, stride in shapes
        )
        self.verdict = norm(nn.Conv2d(2 * channels, 1, (3, 3)))

    def forward(self, waveform: torch.Tensor) -> list[torch.Tensor]:
        """Features of every layer [B, c, bins, frames], the verdict map last, of waveform [B, S]."""
        spectrum = short_time_spectrum(
            waveform, fft_size=self.fft_size, hop=self.fft_size // 4, window=self.window
        )
        parts = torch.view_as_real(spectrum)
        power = parts.square().sum(-1, keepdim=True) + 1e-10
        hidden = (3.0 * parts * power.pow(-0.35)).permute(0, 3, 1, 2)
        features = []
        for layer in self.layers:
            hidden = functional.leaky_relu(layer(hidden), 0.1)
            features.append(hidden)
        features.append(self.verdict(hidden))
        return features


class Discriminators(nn.Module):
    """Spectrum discriminators of three resolutions."""

    def __init__(self, fft_sizes: tuple[int, ...] = (1024, 512, 256)) -> None:
        super().__init__()
        self.judges = nn.ModuleList(SpectrumDiscriminator(size) for size in fft_sizes)

    def forward(self, waveform: torch.Tensor) -> list[list[torch.Tensor]]:
        """Features of every judge, see SpectrumDiscriminator."""
        return [judge(waveform) for judge in self.judges]


def hinge_discriminator(real: list[list[torch.Tensor]], *, fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """Hinge loss of the judges, mean over judges and patches (Lim and Ye 2017)."""
    terms = [
        functional.relu(1.0 - ours[-1]).mean() + functional.relu(1.0 + theirs[-1]).mean()
        for ours, theirs in zip(real, fake, strict=True)
    ]
    return torch.stack(terms).mean()


def hinge_generator(fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """What the codec lowers: minus the judges' verdict."""
    return torch.stack([-features[-1].mean() for features in fake]).mean()


def feature_distance(real: list[list[torch.Tensor]], *, fake: list[list[torch.Tensor]]) -> torch.Tensor:
    """L1 between the judges' hidden features, each over the mean size of the real one (Larsen et al. 2016)."""
    terms = []
    for ours, theirs in zip(real, fake, strict=True):
        for wanted, got in zip(ours[:-1], theirs[:-1], strict=True):
            wanted = wanted.detach()
            terms.append((wanted - got).abs().mean() / wanted.abs().mean().clamp(min=1e-4))
    return torch.stack(terms).mean()
