"""Motion clips: an emoji that moves in one of eight ways over 17 frames; the label is exact by construction."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

FRAMES = 17
FRAMES_PER_SECOND = 8
PIXELS = 64
OVERSAMPLE = 2


@dataclasses.dataclass(frozen=True)
class Motion:
    """A motion's label and its words in English and Chinese (appended to the emoji's name)."""

    label: str
    english: str
    chinese: str


@dataclasses.dataclass(frozen=True)
class Pose:
    """Centre offset as a fraction of the frame, clockwise angle in radians, object size as a fraction of the frame."""

    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0
    size: float = 0.56


MOTIONS = (
    Motion("left", "moving left", "向左移动"),
    Motion("right", "moving right", "向右移动"),
    Motion("up", "moving up", "向上移动"),
    Motion("down", "moving down", "向下移动"),
    Motion("clockwise", "turning clockwise", "顺时针旋转"),
    Motion("anticlockwise", "turning anticlockwise", "逆时针旋转"),
    Motion("growing", "growing", "变大"),
    Motion("shrinking", "shrinking", "变小"),
)


def pose_at(label: str, *, progress: float) -> Pose:
    """Where the object is after `progress` in 0..1 of the clip."""
    shift = 0.44 * (progress - 0.5)
    small, large = 0.3, 0.92
    return {
        "left": Pose(x=-shift),
        "right": Pose(x=shift),
        "up": Pose(y=-shift),
        "down": Pose(y=shift),
        "clockwise": Pose(angle=2 * math.pi * progress * 0.75, size=0.66),
        "anticlockwise": Pose(angle=-2 * math.pi * progress * 0.75, size=0.66),
        "growing": Pose(size=small + (large - small) * progress),
        "shrinking": Pose(size=large - (large - small) * progress),
    }[label]


def render_clip(picture: Image.Image, *, label: str) -> list[np.ndarray]:
    """17 frames [64, 64, 3] uint8 on white."""
    source = picture.resize((96, 96), Image.Resampling.LANCZOS)
    return [_render_pose(source, pose=pose_at(label, progress=i / (FRAMES - 1))) for i in range(FRAMES)]


def _render_pose(source: Image.Image, *, pose: Pose) -> np.ndarray:
    side = PIXELS * OVERSAMPLE
    scale = source.width / (pose.size * side)
    cos, sin = math.cos(pose.angle) * scale, math.sin(pose.angle) * scale
    centre_x, centre_y = side * (0.5 + pose.x), side * (0.5 + pose.y)
    middle = source.width / 2
    inverse = (cos, sin, middle - cos * centre_x - sin * centre_y, -sin, cos, middle + sin * centre_x - cos * centre_y)
    moved = source.convert("RGBa").transform((side, side), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    frame = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    frame.alpha_composite(moved.convert("RGBA"))
    return np.asarray(frame.convert("RGB").reduce(OVERSAMPLE))
