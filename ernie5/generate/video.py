"""Films clips: the frames of image.py in a row, each finished frame leading to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ernie5.data.document import Document
from ernie5.generate.image import BitChoice, Canvas, draw_frames
from ernie5.generate.session import Decoder


def generate_videos(
    prompts: Sequence[Document],
    *,
    unconditional: Sequence[Document],
    decoder: Decoder,
    canvas: Canvas,
    choice: BitChoice,
) -> torch.Tensor:
    """Film one clip per prompt (each ends in BOV); returns latents [B, d, f, h, w] fp32, 1 + 4 (f - 1) frames."""
    return draw_frames(prompts, unconditional=unconditional, decoder=decoder, canvas=canvas, choice=choice)
