"""Pictures and clips to be understood: pixels and frozen encoder features, K patches per backbone position.

A position merges 2 x 2 neighbouring patches of one frame (image, K = 4) or of four frames (video, K = 16), frame-major,
then row-major. It stands at the centre of the cells that it merges, on the same grid as the cells of generation.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch

from ernie5.data.document import Patches
from ernie5.errors import DataError

SIDE = 2


def pad_frames(video: torch.Tensor, *, multiple: int) -> torch.Tensor:
    """[C, F, H, W] -> the same with the last frame repeated until `multiple` divides F."""
    missing = -video.shape[1] % multiple
    return torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1)], dim=1) if missing else video


def merge_patches(pixels: torch.Tensor, *, features: torch.Tensor, frames_per_group: int) -> Patches:
    """Group pixels [3, F, H, W], fp32 in [-1, 1] or uint8, and features [F, A, h, w] into positions.

    F must be a multiple of frames_per_group (1 or 4) and h, w even; raises DataError otherwise.
    """
    num_frames, channels, height, width = features.shape
    if height % SIDE or width % SIDE or num_frames % frames_per_group:
        raise DataError(
            f"a picture of {height}x{width} cells and {num_frames} frames cannot be merged by {SIDE}x{SIDE} cells and "
            f"{frames_per_group} frames. Choose data.image_pixels and data.video_pixels as multiples of twice the "
            "stride."
        )
    stride = pixels.shape[2] // height
    grid = _plan(num_frames, height=height, width=width, frames_per_group=frames_per_group)
    return Patches(
        pixels=_cut(pixels, frames_per_group, stride=stride),
        features=_merge(features.movedim(1, -1), frames_per_group),
        frames=grid.frames,
        patch_places=grid.patch_places,
        places=grid.places,
        starts=grid.starts,
        num_frames=num_frames,
    )


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What of Patches depends on the shape alone."""

    frames: torch.Tensor
    patch_places: torch.Tensor
    places: torch.Tensor
    starts: np.ndarray


@functools.lru_cache(maxsize=256)
def _plan(num_frames: int, *, height: int, width: int, frames_per_group: int) -> _Grid:
    frames = torch.arange(num_frames)[:, None, None, None].expand(-1, height, width, 1)
    patch_places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).reshape(1, height, width, 2)
    groups, rows, columns = num_frames // frames_per_group, height // SIDE, width // SIDE
    centres = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float() * SIDE + (SIDE - 1) / 2
    group = torch.arange(groups).repeat_interleave(rows * columns)
    return _Grid(
        frames=_merge(frames, frames_per_group)[..., 0],
        patch_places=_merge(patch_places.expand(num_frames, -1, -1, -1), frames_per_group),
        places=torch.cat([group[:, None].float(), centres.reshape(-1, 2).repeat(groups, 1)], dim=1),
        starts=group.numpy() * (rows * columns),
    )


def _cut(pixels: torch.Tensor, frames_per_group: int, *, stride: int) -> torch.Tensor:
    """[3, F, H, W] -> [n, K, 3*s*s] fp32 in [-1, 1]: patches channel-major, in the order of `_merge`."""
    colours, num_frames, height, width = pixels.shape
    rows, columns = height // (SIDE * stride), width // (SIDE * stride)
    split = pixels.reshape(
        colours, num_frames // frames_per_group, frames_per_group, rows, SIDE, stride, columns, SIDE, stride
    )
    patches = split.permute(1, 3, 6, 2, 4, 7, 0, 5, 8).reshape(-1, frames_per_group * SIDE * SIDE, colours * stride**2)
    return patches.float().div_(127.5).sub_(1.0) if patches.dtype == torch.uint8 else patches


def _merge(cells: torch.Tensor, frames_per_group: int) -> torch.Tensor:
    """[F, h, w, X] -> [F/g * h/2 * w/2, g*4, X]."""
    num_frames, height, width, values = cells.shape
    split = cells.reshape(
        num_frames // frames_per_group, frames_per_group, height // SIDE, SIDE, width // SIDE, SIDE, values
    )
    return split.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, frames_per_group * SIDE * SIDE, values)
