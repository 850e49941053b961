"""Pictures and clips to be understood: pixels and frozen encoder features, K patches per backbone position.

A position merges 2 x 2 neighbouring patches of one frame (image, K = 4) or of four frames (video, K = 16), frame-major,
then row-major. It stands at the centre of the cells that it merges, on the same grid as the cells of generation.
"""

from __future__ import annotations

import torch

from ernie5.data.document import Patches
from ernie5.errors import DataError

SIDE = 2


def pad_frames(video: torch.Tensor, *, multiple: int) -> torch.Tensor:
    """[C, F, H, W] -> the same with the last frame repeated until `multiple` divides F."""
    missing = -video.shape[1] % multiple
    return torch.cat([video, video[:, -1:].expand(-1, missing, -1, -1)], dim=1) if missing else video


def merge_patches(pixels: torch.Tensor, *, features: torch.Tensor, frames_per_group: int) -> Patches:
    """Group pixels [3, F, H, W] in [-1, 1] and features [F, A, h, w] into positions.

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
    cut = pixels.movedim(1, 0).reshape(num_frames, 3, height, stride, width, stride)
    cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
    frames = torch.arange(num_frames)[:, None, None, None].expand(-1, height, width, 1)
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).reshape(1, height, width, 2)
    groups, rows, columns = num_frames // frames_per_group, height // SIDE, width // SIDE
    centres = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float() * SIDE + (SIDE - 1) / 2
    return Patches(
        pixels=_merge(cut, frames_per_group),
        features=_merge(features.movedim(1, -1), frames_per_group),
        frames=_merge(frames, frames_per_group)[..., 0],
        places=_merge(places.expand(num_frames, -1, -1, -1), frames_per_group),
        coordinates=centres.reshape(-1, 2).repeat(groups, 1),
        groups=torch.arange(groups).repeat_interleave(rows * columns),
    )


def _merge(cells: torch.Tensor, frames_per_group: int) -> torch.Tensor:
    """[F, h, w, X] -> [F/g * h/2 * w/2, g*4, X]."""
    num_frames, height, width, values = cells.shape
    split = cells.reshape(
        num_frames // frames_per_group, frames_per_group, height // SIDE, SIDE, width // SIDE, SIDE, values
    )
    return split.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, frames_per_group * SIDE * SIDE, values)
