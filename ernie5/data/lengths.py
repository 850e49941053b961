"""How many positions a picture or clip takes, known before any sample is read (SPEC section 2)."""

from __future__ import annotations

from ernie5.data.config import DataConfig
from ernie5.data.features import FRAMES_PER_GROUP
from ernie5.data.patches import SIDE
from ernie5.tokenizers.visual.scales import num_cells, scale_schedule
from ernie5.tokenizers.visual.tokenizer import VisualTokenizer

UNDERSTANDING_FRAME = 5  # BOS BOI .. EOI SEP text EOS, without the text
GENERATION_FRAME = 5  # BOS text SEP BOI .. EOI EOS, without the text
PAGE_FRAME = 3  # BOI .. EOI, and the place that every part of a page keeps for EOS


def shortest_documents(config: DataConfig, *, visual: VisualTokenizer) -> dict[str, int]:
    """Positions of the shortest possible document, its words left out, for every task with pictures or clips."""
    image, video = config.image_pixels // visual.stride, config.video_pixels // visual.stride
    groups = -(-config.video_frames // FRAMES_PER_GROUP)
    latent_frames = 1 + (config.video_frames - 1) // visual.temporal_stride
    seen_image, seen_clip = (image // SIDE) ** 2, groups * (video // SIDE) ** 2
    return {
        "image_to_text": UNDERSTANDING_FRAME + seen_image,
        "text_to_image": GENERATION_FRAME + _frame_positions(image, visual=visual),
        "video_to_text": UNDERSTANDING_FRAME + seen_clip,
        "text_to_video": GENERATION_FRAME + latent_frames * _frame_positions(video, visual=visual),
        "page": PAGE_FRAME + seen_image,
    }


def _frame_positions(side: int, *, visual: VisualTokenizer) -> int:
    """Positions of one drawn latent frame of side x side cells: scale 1 takes none, the finished picture one a cell."""
    return num_cells(scale_schedule(side, side, sizes=visual.sizes)) - 1 + side * side
