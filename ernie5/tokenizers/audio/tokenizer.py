"""The audio tokenizer: speech of any length to codes [B, T, Q] at 12.5 Hz, and the codes of the first q levels back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from ernie5.config.load import config_from_dict, config_to_dict
from ernie5.errors import ConfigError, TokenizerError
from ernie5.tokenizers.audio.codec import Decoder, Encoder
from ernie5.tokenizers.audio.mel import check_waveform
from ernie5.tokenizers.audio.rvq import Quantized, ResidualQuantizer
from ernie5.tokenizers.config import AudioTokenizerConfig
from ernie5.tokenizers.weights import load_weights, save_weights


class AudioTokenizer(nn.Module):
    """Encoder, residual quantiser and decoder of the codec. identity: sha256 of the weights file, "untrained" before
    there is one."""

    def __init__(self, config: AudioTokenizerConfig, *, identity: str = "untrained") -> None:
        super().__init__()
        self.config = config
        self.identity = identity
        self.encoder = Encoder(config)
        self.quantizer = ResidualQuantizer(config.code_width, levels=config.levels, codes=config.codes)
        self.decoder = Decoder(config)

    @property
    def levels(self) -> int:
        """Residual levels Q that the codec was trained with."""
        return self.config.levels

    @property
    def codes(self) -> int:
        """Codes C per level."""
        return self.config.codes

    @property
    def sample_rate(self) -> int:
        """Sampling rate in Hz."""
        return self.config.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Samples of one codec frame."""
        return self.config.samples_per_frame

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor) -> torch.Tensor:
        """Codes [B, T, Q] int64 in 0..C-1 of waveform [B, samples] fp32 in [-1, 1] at 16 kHz.

        T = ceil(samples / samples_per_frame); the last frame is completed with silence. Raises TokenizerError for an
        empty waveform, another rank than two, or samples that are not finite.
        """
        check_waveform(waveform, purpose="audio codes")
        missing = -waveform.shape[1] % self.samples_per_frame
        latents = self.encoder(functional.pad(waveform.float(), (0, missing)))
        return self.quantize(latents, active_levels=None).codes

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Waveform [B, T samples_per_frame] fp32 within [-1, 1] of codes [B, T, q] int64, the first q <= Q levels.

        Raises TokenizerError for no frames, more levels than the codec has, or a code outside 0..C-1.
        """
        if codes.dim() == 3 and codes.shape[1] == 0:
            raise TokenizerError(
                "audio codes hold no frames, so there is nothing to decode. Pass [rows, frames, levels] with at least "
                "one frame."
            )
        return self.decoder(self.quantizer.look_up(codes)).clamp(-1.0, 1.0)

    def quantize(self, latents: torch.Tensor, *, active_levels: torch.Tensor | None) -> Quantized:
        """Quantise encoder output [B, T, code_width]; active_levels [B] int64 limits the levels that reach the sum
        (quantiser dropout), None uses all."""
        if active_levels is None:
            active_levels = torch.full((latents.shape[0],), self.levels, device=latents.device)
        return self.quantizer.quantize(latents, active_levels=active_levels)


def save_audio_tokenizer(
    tokenizer: AudioTokenizer, *, directory: str | Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the weights with their config; returns the file. Raises EnvironmentFault when the disk refuses."""
    config_json = json.dumps(config_to_dict(tokenizer.config))
    return save_weights(tokenizer, kind="audio", config_json=config_json, directory=Path(directory), dtype=dtype)


def load_audio_tokenizer(place: str | Path, *, device: str = "cpu") -> AudioTokenizer:
    """The codec at `place`: the word `embedded`, the directory of a trained one, or its file; frozen, fp32, in eval
    mode. Raises TokenizerError for a file that is missing, damaged, or not an audio tokenizer of this version."""
    stored = load_weights(place, kind="audio")
    try:
        config = config_from_dict(json.loads(stored.config_json), schema=AudioTokenizerConfig, name=str(stored.path))
    except ConfigError as problem:
        raise TokenizerError(f"{stored.path} does not describe an audio codec of this version: {problem}") from problem
    tokenizer = AudioTokenizer(config, identity=stored.identity)
    stored.fill(tokenizer)
    return tokenizer.to(device).eval().requires_grad_(False)
