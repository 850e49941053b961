"""Understanding inputs: a ViT per frame, the frozen tokenizer's CNN features, and the attention-based patch merger.

Per backbone position, K patches arrive on two paths (SPEC section 2): ViT and CNN features are concatenated along the
patch axis (2K), mixed by multi-head self-attention, mean-pooled and projected to the backbone's width.
"""

from __future__ import annotations

import torch
from torch import nn

from ernie5.model.config import ModelConfig, VisualModelConfig, vit_hidden
from ernie5.model.linear import Linear
from ernie5.model.mlp import SwiGLU
from ernie5.model.norm import RMSNorm
from ernie5.records import VisualPatches
from ernie5_kernels.rope3d import rope3d, rotation_of

PLACE_BASE = 10000.0


class PatchAttention(nn.Module):
    """Bidirectional multi-head self-attention over small groups of patches."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width)

    def forward(
        self, x: torch.Tensor, *, rotation: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [G, P, W] -> [G, P, W]; rotation [G, P, C/2] complex; mask [G, P] bool, True where a patch exists."""
        parts = (self.query, self.key, self.value)
        query, key, value = (part(x).unflatten(-1, (-1, self.head_width)) for part in parts)
        if rotation is not None:
            query, key = rope3d(query, rotation=rotation), rope3d(key, rotation=rotation)
        out = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if mask is None else mask[:, None, None, :],
        )
        return self.output(out.transpose(1, 2).flatten(2))


class ViTLayer(nn.Module):
    """Pre-norm transformer layer over the patches of one frame."""

    def __init__(self, config: VisualModelConfig, *, eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.vit_width, eps=eps)
        self.attention = PatchAttention(config.vit_width, heads=config.vit_heads)
        self.mlp_norm = RMSNorm(config.vit_width, eps=eps)
        self.mlp = SwiGLU(config.vit_width, hidden_width=vit_hidden(config))

    def forward(self, x: torch.Tensor, *, rotation: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[G, P, W] -> [G, P, W]."""
        x = x + self.attention(self.attention_norm(x), rotation=rotation, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class VisionTransformer(nn.Module):
    """Patches of frames -> features; attention stays within a frame, places enter by a 2-D rotation."""

    def __init__(self, config: VisualModelConfig, *, eps: float) -> None:
        super().__init__()
        self.head_width = config.vit_width // config.vit_heads
        self.patch = Linear(3 * config.patch_pixels**2, config.vit_width)
        self.layers = nn.ModuleList([ViTLayer(config, eps=eps) for _ in range(config.vit_layers)])
        self.norm = RMSNorm(config.vit_width, eps=eps)

    def forward(self, pixels: torch.Tensor, *, frame_ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """pixels [M, 3*s*s], frame_ids [M], places [M, 2] -> features [M, W] in the same order."""
        slots, num_frames, largest = _slots_by_frame(frame_ids)
        x = self.patch(pixels)
        angles = _place_angles(places, head_width=self.head_width, dtype=x.dtype)
        num_slots = num_frames * largest
        x = x.new_zeros(num_slots, x.shape[1]).index_copy(0, slots, x).view(num_frames, largest, -1)
        angles = angles.new_zeros(num_slots, angles.shape[1]).index_copy(0, slots, angles).view(num_frames, largest, -1)
        mask = None
        if num_slots != slots.numel():
            mask = torch.zeros(num_slots, dtype=torch.bool, device=slots.device).index_fill(0, slots, True)
            mask = mask.view(num_frames, largest)
        rotation = rotation_of(angles)
        for layer in self.layers:
            x = layer(x, rotation=rotation, mask=mask)
        return self.norm(x.flatten(0, 1).index_select(0, slots))


def _slots_by_frame(frame_ids: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Slot of each patch in a [frames, patches of the largest frame] grid, and the grid's two sizes."""
    _, frame, counts = torch.unique(frame_ids, return_inverse=True, return_counts=True)
    order = torch.argsort(frame, stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(frame)
    place[order] = torch.arange(frame.numel(), device=frame.device) - starts[frame[order]]
    largest = int(counts.max())
    return frame * largest + place, counts.numel(), largest


def _place_angles(places: torch.Tensor, *, head_width: int, dtype: torch.dtype) -> torch.Tensor:
    """Angles [M, C/2]: half of the pairs turn with y, half with x."""
    wide = torch.promote_types(dtype, torch.float32)
    count = head_width // 4
    exponents = torch.arange(count, dtype=wide, device=places.device) / count
    frequencies = PLACE_BASE**-exponents
    return (places.to(wide).unsqueeze(-1) * frequencies).flatten(1)


class PatchMerger(nn.Module):
    """2K features of two paths -> one backbone position: x + attention(norm x), mean over patches, projection, norm.

    Without the last norm nothing bounds the size of what enters: it grew to 80 times a text embedding in 800 steps, and
    what the layers added was lost beside it.
    """

    def __init__(self, config: ModelConfig, *, patches: int) -> None:
        super().__init__()
        width = config.visual.vit_width
        self.slots = nn.Parameter(torch.empty(2 * patches, width))
        self.norm = RMSNorm(width, eps=config.norm_eps)
        self.attention = PatchAttention(width, heads=config.visual.vit_heads)
        self.output = Linear(width, config.width)
        self.output_norm = RMSNorm(config.width, eps=config.norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, 2K, W] -> [N, D]; `slots` tells the two paths and the places within the group apart."""
        x = features + self.slots
        return self.output_norm(self.output((x + self.attention(self.norm(x))).mean(1)))


class VisionEncoder(nn.Module):
    """From VisualPatches to backbone inputs, for images and for clips."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vit = VisionTransformer(config.visual, eps=config.norm_eps)
        self.cnn = Linear(config.visual.encoder_channels, config.visual.vit_width)
        self.image_merger = PatchMerger(config, patches=config.visual.image_merge)
        self.video_merger = PatchMerger(config, patches=config.visual.video_merge)

    def forward(self, patches: VisualPatches, *, merger: PatchMerger) -> torch.Tensor:
        """N groups of K patches -> [N, D]. `merger` is `image_merger` or `video_merger`; N > 0."""
        dtype = self.cnn.weight.dtype
        seen = self.vit(
            patches.pixels.flatten(0, 1).to(dtype),
            frame_ids=patches.frame_ids.flatten(),
            places=patches.places.flatten(0, 1),
        ).view(*patches.frame_ids.shape, -1)
        return merger(torch.cat((seen, self.cnn(patches.features.to(dtype))), dim=1))
