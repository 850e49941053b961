"""The visual tokenizer as the rest of the system sees it: features, latents, codes and pixels."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from ernie5.config.load import config_from_dict, config_to_dict
from ernie5.errors import TokenizerError
from ernie5.tokenizers.config import VisualTokenizerConfig
from ernie5.tokenizers.visual.codec import Decoder, Encoder
from ernie5.tokenizers.visual.quantizer import MultiScaleQuantizer
from ernie5.tokenizers.visual.scales import scale_schedule
from ernie5.tokenizers.weights import load_weights, save_weights

UNTRAINED = "untrained"


class VisualTokenizer(nn.Module):
    """Pictures [B, 3, 1, H, W] and clips [B, 3, 1+4n, H, W] in [-1, 1], H and W multiples of `stride`.

    stride, temporal_stride: pixels and frames per latent cell; bits: d; feature_channels: A; identity: hash of the
    weights file, "untrained" before there is one; sizes: scale sides of the largest square grid.
    """

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.stride = 2 * config.patch
        self.temporal_stride = 4
        self.bits = config.bits
        self.feature_channels = config.feature_channels
        self.sizes = config.sizes
        self.identity = UNTRAINED
        self.quantizer = MultiScaleQuantizer()
        self.encoder = Encoder(config)
        self.project = nn.Conv2d(config.feature_channels, config.bits, 1)
        self.decoder = Decoder(config)

    def encode_features(self, video: torch.Tensor) -> torch.Tensor:
        """video [B, 3, F, H, W] fp32 in [-1, 1] -> [B, A, 1+(F-1)/4, H/stride, W/stride] fp32, before quantisation.

        Raises TokenizerError for sides or frame counts that the strides do not divide.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise TokenizerError(f"A clip is [B, 3, F, H, W], got {tuple(video.shape)}. Add a frame axis to pictures.")
        frames, height, width = video.shape[2:]
        if height % self.stride or width % self.stride or min(height, width) < self.stride:
            raise TokenizerError(
                f"Pictures of {height}x{width} px do not fit the visual tokenizer: both sides must be positive "
                f"multiples of its stride of {self.stride} px. Resize them. (data.image_pixels, data.video_pixels)"
            )
        if frames % self.temporal_stride != 1:
            raise TokenizerError(
                f"A clip of {frames} frames does not fit the visual tokenizer: it takes 1+4n frames, such as "
                f"{max(1, frames - (frames - 1) % 4)}. Cut it or repeat its last frame."
            )
        return self.encoder(video)

    def encode_frames(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] -> features [B, A, H/stride, W/stride] fp32, each picture by itself."""
        return self.encode_features(images[:, :, None])[:, :, 0]

    def to_latents(self, features: torch.Tensor) -> torch.Tensor:
        """features [B, A, f, h, w] -> latents [B, d, f, h, w] fp32: what the residual quantiser takes as F."""
        folded = features.transpose(1, 2).flatten(0, 1)
        latents = self.project(folded).float()
        return latents.unflatten(0, (features.shape[0], -1)).transpose(1, 2)

    def quantize(self, latents: torch.Tensor, *, num_scales: int | None = None) -> torch.Tensor:
        """latents [B, d, f, h, w] -> the sum of their first `num_scales` (default all) scales, same shape."""
        folded = latents.transpose(1, 2).flatten(0, 1)
        grid = (latents.shape[-2], latents.shape[-1])
        schedule = scale_schedule(*grid, sizes=self.sizes)
        codes = self.quantizer.encode(folded, schedule=schedule)
        summed = self.quantizer.decode(codes.targets[: num_scales or len(schedule)], grid=grid)
        return summed.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, d, f, h, w] fp32 -> video [B, 3, 1+4(f-1), h*stride, w*stride] fp32, clamped to [-1, 1]."""
        return self.decoder(latents).clamp(-1.0, 1.0)

    def reconstruct(self, video: torch.Tensor, *, num_scales: int | None = None) -> torch.Tensor:
        """video [B, 3, F, H, W] through encoder, quantiser (first `num_scales` scales) and decoder; same shape."""
        return self.decode(self.quantize(self.to_latents(self.encode_features(video)), num_scales=num_scales))


def continue_visual_tokenizer(tokenizer: VisualTokenizer, *, place: str | Path) -> None:
    """Fill `tokenizer` with the tokenizer at `place`; layers that only the new one has keep their initial weights.

    Blocks start as (nearly) the identity, so that a codec can grow deeper. Raises TokenizerError when the stored one
    has layers that the new one lacks or holds in another shape.
    """
    stored = load_weights(place, kind="visual")
    own = tokenizer.state_dict()
    wrong = [name for name, value in stored.tensors if name not in own or own[name].shape != value.shape]
    if wrong:
        raise TokenizerError(
            f"{stored.path} cannot be continued by this visual tokenizer: {len(wrong)} of its tensors are missing here "
            f"or have another shape, the first is {wrong[0]}. Layers may be added, not removed or resized. "
            "(tokenizer.visual.start)"
        )
    tokenizer.load_state_dict(own | dict(stored.tensors))


def save_visual_tokenizer(
    tokenizer: VisualTokenizer, directory: str | Path, *, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the weights with their config; returns the file. Raises EnvironmentFault when the disk refuses."""
    config_json = json.dumps(config_to_dict(tokenizer.config))
    return save_weights(tokenizer, kind="visual", config_json=config_json, directory=Path(directory), dtype=dtype)


def load_visual_tokenizer(place: str | Path = "embedded", *, device: str | torch.device = "cpu") -> VisualTokenizer:
    """The tokenizer at `place` (`embedded`, a directory or a file) in fp32, eval mode, frozen.

    Raises TokenizerError when it is missing, damaged or of another kind.
    """
    stored = load_weights(place, kind="visual")
    config = config_from_dict(json.loads(stored.config_json), schema=VisualTokenizerConfig, name=str(stored.path))
    tokenizer = VisualTokenizer(config)
    stored.fill(tokenizer)
    tokenizer.identity = stored.identity
    return tokenizer.to(device).eval().requires_grad_(False)


