"""The convolutional codec: encoder and decoder, causal in time, one network for pictures and clips.

Tensors are [B*F, C, H, W] in channels_last, frames folded into the batch; every layer that looks at other frames gets
their number F and looks back only. Inflation: the kernels of past frames and the temporal branches start at zero, so a
fresh codec treats each frame as a picture, and a picture is exactly the first frame of a clip at any time of training.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ernie5.tokenizers.config import HEAD_CHANNELS, VisualTokenizerConfig

PAST_FRAMES = 2
"""Frames before the present one that an inflated kernel covers."""

BRANCH_SCALE = 0.3
"""What the branches of an attention block are scaled by: they start at zero and should grow slowly."""


def previous_frames(x: torch.Tensor, *, frames: int, steps: int) -> torch.Tensor:
    """[B*F, C, H, W] -> the same shifted `steps` frames into the future: frame t holds t-steps, zeros before it."""
    video = x.unflatten(0, (-1, frames))
    past = torch.zeros_like(video)
    past[:, steps:] = video[:, : frames - steps]
    return past.flatten(0, 1)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel; [N, C, H, W] in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype; statistics in fp32."""
        rows = functional.layer_norm(x.permute(0, 2, 3, 1).float(), self.weight.shape, self.weight, self.bias)
        return rows.to(x.dtype).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Residual block: norm, 3x3 convolution, GELU, 3x3 convolution; the first one looks back in time.

    Its inflated kernel is 3x3x3: the present slice mixes channels, the two past slices are depthwise (a hundredth of
    the cost) and start at zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.past = nn.Parameter(torch.zeros(PAST_FRAMES, channels, 1, 3, 3))
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, x: torch.Tensor, *, frames: int) -> torch.Tensor:
        """[B*F, C, H, W] -> the same shape; frame t sees t, t-1 and t-2."""
        normed = self.norm(x)
        mixed = self.first(normed)
        for steps in range(1, min(frames, PAST_FRAMES + 1)):
            shifted = previous_frames(normed, frames=frames, steps=steps)
            mixed = mixed + functional.conv2d(shifted, self.past[steps - 1], padding=1, groups=x.shape[1])
        return x + self.second(functional.gelu(mixed, approximate="tanh")) * self.scale


class AttentionBlock(nn.Module):
    """Residual attention over the cells of one frame, then a pointwise network; starts as the identity.

    A depthwise convolution before it tells cells where they are, by the zeros beyond the edges, on grids of any size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.place = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.inner_norm = ChannelNorm(channels), ChannelNorm(channels)
        self.queries_keys_values = nn.Linear(channels, 3 * channels)
        self.mix = nn.Linear(channels, channels)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.heads = max(1, channels // HEAD_CHANNELS)
        for last in (self.place, self.mix, self.narrow):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: torch.Tensor, *, frames: int) -> torch.Tensor:
        """[B*F, C, H, W] -> the same shape; every frame by itself, whatever `frames` is."""
        x = x + self.place(x) * BRANCH_SCALE
        height, width = x.shape[-2:]
        heads = self.queries_keys_values(_rows(self.norm(x))).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        x = x + _grid(self.mix(seen), height=height, width=width) * BRANCH_SCALE
        wide = functional.gelu(self.widen(_rows(self.inner_norm(x))), approximate="tanh")
        return x + _grid(self.narrow(wide), height=height, width=width) * BRANCH_SCALE


class TemporalDown(nn.Module):
    """Halve the frames, 1+2n -> 1+n: frame 2t plus a branch over frames 2t-2, 2t-1, 2t that starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear((1 + PAST_FRAMES) * channels, channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor, *, frames: int) -> torch.Tensor:
        """[B*(1+2n), C, H, W] -> [B*(1+n), C, H, W]."""
        if frames == 1:
            window = functional.pad(x.permute(0, 2, 3, 1), (0, PAST_FRAMES * x.shape[1]))
            kept = x
        else:
            shifted = [previous_frames(x, frames=frames, steps=s) for s in range(1, PAST_FRAMES + 1)]
            every_other = [y.unflatten(0, (-1, frames))[:, ::2].flatten(0, 1) for y in (x, *shifted)]
            kept, window = every_other[0], torch.cat(every_other, dim=1).permute(0, 2, 3, 1)
        return kept + self.out(functional.gelu(self.mix(window), approximate="tanh")).permute(0, 3, 1, 2)


class TemporalUp(nn.Module):
    """Double the frames, 1+n -> 1+2n: frame 2t is frame t, frame 2t-1 adds a branch over t and t-1, zero at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * channels, channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: torch.Tensor, *, frames: int) -> torch.Tensor:
        """[B*(1+n), C, H, W] -> [B*(1+2n), C, H, W]."""
        if frames == 1:
            return x
        video = x.unflatten(0, (-1, frames))
        window = torch.cat([video[:, 1:], video[:, :-1]], dim=2).flatten(0, 1).permute(0, 2, 3, 1)
        branch = self.out(functional.gelu(self.mix(window), approximate="tanh")).permute(0, 3, 1, 2)
        between = video[:, 1:] + branch.unflatten(0, (-1, frames - 1))
        pairs = torch.stack([between, video[:, 1:]], dim=2).flatten(1, 2)
        return torch.cat([video[:, :1], pairs], dim=1).flatten(0, 1)


def fold_frames(video: torch.Tensor) -> torch.Tensor:
    """[B, C, F, H, W] -> [B*F, C, H, W] in channels_last."""
    return video.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def unfold_frames(x: torch.Tensor, *, batch: int) -> torch.Tensor:
    """[B*F, C, H, W] -> [B, C, F, H, W], contiguous."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()


class Encoder(nn.Module):
    """Pixels to features: fold `patch` pixels, blocks at stride `patch`, halve, halve time twice, blocks."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        stem, channels = config.stem_channels, config.channels
        self.patch = config.patch
        self.stem = nn.Conv2d(3 * config.patch**2, stem, 3, padding=1)
        self.stem_blocks = _blocks(config.stem_blocks, channels=stem)
        self.down = nn.Conv2d(stem, channels, 2, stride=2)
        self.temporal = nn.ModuleList(TemporalDown(channels) for _ in range(2))
        self.blocks = _blocks(config.encoder_blocks, channels=channels)
        self.norm = ChannelNorm(channels)
        self.out = nn.Conv2d(channels, config.feature_channels, 1)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        """[B, 3, F, H, W] in [-1, 1] -> features [B, A, 1+(F-1)/4, H/stride, W/stride] fp32."""
        batch, frames = video.shape[0], video.shape[2]
        folded = functional.pixel_unshuffle(fold_frames(video), self.patch)
        x = self.stem(folded.contiguous(memory_format=torch.channels_last))
        for block in self.stem_blocks:
            x = block(x, frames=frames)
        x = self.down(x)
        for halve in self.temporal:
            x = halve(x, frames=frames)
            frames = (frames + 1) // 2
        for block in self.blocks:
            x = block(x, frames=frames)
        return unfold_frames(self.out(self.norm(x)).float(), batch=batch)


class Decoder(nn.Module):
    """Latents to pixels: blocks, double time twice, double the grid, blocks at stride `patch`, unfold pixels."""

    def __init__(self, config: VisualTokenizerConfig) -> None:
        super().__init__()
        stem, channels = config.stem_channels, config.channels
        self.patch = config.patch
        self.inward = nn.Conv2d(config.bits, channels, 3, padding=1)
        self.blocks = _blocks(config.decoder_blocks, channels=channels)
        self.attention = nn.ModuleList(AttentionBlock(channels) for _ in range(config.decoder_attention))
        self.temporal = nn.ModuleList(TemporalUp(channels) for _ in range(2))
        self.up = nn.Conv2d(channels, 4 * stem, 1)
        self.head_blocks = _blocks(config.head_blocks, channels=stem)
        self.norm = ChannelNorm(stem)
        self.out = nn.Conv2d(stem, 3 * config.patch**2, 3, padding=1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, d, f, h, w] -> video [B, 3, 1+4(f-1), h*stride, w*stride] fp32, not clamped."""
        batch, frames = latents.shape[0], latents.shape[2]
        x = self.inward(fold_frames(latents))
        for block in (*self.blocks, *self.attention):
            x = block(x, frames=frames)
        for double in self.temporal:
            x = double(x, frames=frames)
            frames = 2 * frames - 1
        x = functional.pixel_shuffle(self.up(x), 2).contiguous(memory_format=torch.channels_last)
        for block in self.head_blocks:
            x = block(x, frames=frames)
        pixels = functional.pixel_shuffle(self.out(self.norm(x)).float(), self.patch)
        return unfold_frames(pixels, batch=batch)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, H*W, C]."""
    return x.flatten(2).transpose(1, 2)


def _grid(rows: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """[N, H*W, C] -> [N, C, H, W] in channels_last."""
    return rows.transpose(1, 2).unflatten(2, (height, width))


def _blocks(count: int, *, channels: int) -> nn.ModuleList:
    return nn.ModuleList(Block(channels) for _ in range(count))
