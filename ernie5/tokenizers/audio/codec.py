"""The 12.5 Hz codec: log-mel -> ConvNeXt-1D encoder -> latents, and latents -> ConvNeXt-1D decoder -> inverse STFT.

Most parameters work at 12.5 Hz and at 50 Hz, where a frame is cheap; only thin blocks and the spectral head run at the
spectrum's own rate. Blocks: ConvNeXt (Liu et al. 2022) in one dimension; head: amplitude and phase of a short-time
spectrum, overlap-added by the inverse transform (Siuzdak 2023, Vocos), which costs a fraction of a waveform decoder.
Convolutions see both directions: a clip is coded as a whole, streaming is not a goal.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ernie5.tokenizers.audio.mel import LogMel
from ernie5.tokenizers.config import AudioTokenizerConfig

# exp(3) / window sum is far above full scale; without a limit one outlier of the log-amplitude overflows.
LOG_AMPLITUDE_LIMIT = 3.0
# Rough mean and spread of speech log-mels in nepers: brings the encoder's input near zero mean and unit variance.
MEL_CENTRE = -6.0
MEL_SPREAD = 2.5


class Block(nn.Module):
    """ConvNeXt block: depthwise convolution over 7 frames, norm, two linear layers, scaled residual. [B, T, D]."""

    def __init__(self, width: int, *, expansion: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, expansion * width)
        self.narrow = nn.Linear(expansion * width, width)
        # Small residual branches at the start, as in ConvNeXt; 0.1 rather than 1e-6 because the stack is shallow.
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self.scale * self.narrow(functional.gelu(self.widen(self.norm(mixed))))


class Shorten(nn.Module):
    """`factor` neighbouring frames of width D become one of width `width`: [B, factor T, D] -> [B, T, width]."""

    def __init__(self, width_in: int, *, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.norm = nn.LayerNorm(width_in)
        self.project = nn.Linear(factor * width_in, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, frames, width = hidden.shape
        return self.project(self.norm(hidden).reshape(batch, frames // self.factor, self.factor * width))


class Lengthen(nn.Module):
    """Inverse shape of `Shorten`: [B, T, D] -> [B, factor T, width]."""

    def __init__(self, width_in: int, *, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.norm = nn.LayerNorm(width_in)
        self.project = nn.Linear(width_in, factor * width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, frames, _ = hidden.shape
        return self.project(self.norm(hidden)).reshape(batch, frames * self.factor, -1)


class Encoder(nn.Module):
    """Waveform [B, S] with S a multiple of the frame length -> latents [B, S / samples_per_frame, code_width]."""

    def __init__(self, config: AudioTokenizerConfig) -> None:
        super().__init__()
        self.log_mel = LogMel(
            config.mel_bands, fft_size=config.fft_size, hop=config.hop, sample_rate=config.sample_rate
        )
        widths, factors = config.encoder_widths, config.factors
        self.enter = nn.Conv1d(config.mel_bands, widths[0], 3, padding=1)
        stages: list[nn.Module] = []
        for stage, depth in enumerate(config.encoder_depths):
            if stage:
                stages.append(Shorten(widths[stage - 1], width=widths[stage], factor=factors[stage - 1]))
            stages += [Block(widths[stage], expansion=config.expansion) for _ in range(depth)]
        self.stages = nn.Sequential(*stages)
        self.leave = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], config.code_width))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        mel = (self.log_mel(waveform) - MEL_CENTRE) / MEL_SPREAD
        return self.leave(self.stages(self.enter(mel).transpose(1, 2)))


class InverseSpectrum(nn.Module):
    """Short-time spectra [B, T, fft_size // 2 + 1] complex -> waveform [B, T hop]: windowed overlap-add divided by the
    overlap-added squared window, so that analysis with the same window and hop is undone exactly."""

    def __init__(self, fft_size: int, *, hop: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.hop = hop
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)

    def forward(self, spectrum: torch.Tensor) -> torch.Tensor:
        frames = torch.fft.irfft(spectrum, n=self.fft_size, dim=-1) * self.window
        total = self._overlap_add(frames)
        weight = self._overlap_add(self.window.square().expand(1, spectrum.shape[1], -1))
        left = (self.fft_size - self.hop) // 2
        length = spectrum.shape[1] * self.hop
        kept = slice(left, left + length)
        return total[:, kept] / weight[:, kept].clamp(min=1e-3)

    def _overlap_add(self, frames: torch.Tensor) -> torch.Tensor:
        length = (frames.shape[1] - 1) * self.hop + self.fft_size
        folded = functional.fold(
            frames.transpose(1, 2), output_size=(1, length), kernel_size=(1, self.fft_size), stride=(1, self.hop)
        )
        return folded[:, 0, 0]


class Decoder(nn.Module):
    """Latents [B, T, code_width] -> waveform [B, T samples_per_frame], fp32, nominally within [-1, 1]."""

    def __init__(self, config: AudioTokenizerConfig) -> None:
        super().__init__()
        widths, factors = config.decoder_widths, tuple(reversed(config.factors))
        self.enter = nn.Linear(config.code_width, widths[0])
        stages: list[nn.Module] = []
        for stage, depth in enumerate(config.decoder_depths):
            if stage:
                stages.append(Lengthen(widths[stage - 1], width=widths[stage], factor=factors[stage - 1]))
            stages += [Block(widths[stage], expansion=config.expansion) for _ in range(depth)]
        self.stages = nn.Sequential(*stages)
        self.bins = config.fft_size // 2 + 1
        self.leave = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 2 * self.bins))
        self.inverse = InverseSpectrum(config.fft_size, hop=config.hop)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = self.stages(self.enter(latents))
        with torch.autocast(hidden.device.type, enabled=False):
            log_amplitude, phase = self.leave(hidden.float()).split(self.bins, dim=2)
            amplitude = torch.exp(log_amplitude.clamp(max=LOG_AMPLITUDE_LIMIT))
            return self.inverse(torch.polar(amplitude, phase))
