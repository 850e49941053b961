"""How much of each source goes into the embedded cut and into the full one."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CutPlan:
    """One cut. image_colours and speech_kilobits: None means lossless; text_bytes: raw UTF-8 bytes per source."""

    transparency: bool
    image_colours: int | None
    clip_concepts: int
    motions_per_concept: int
    clip_crf: int
    recorded_prompts: int
    recorded_max_seconds: float
    english_concepts: int
    english_voices: int
    mandarin_concepts: int
    speech_kilobits: int | None
    text_bytes: dict[str, int]
    pages: int
    page_image_pixels: int
    page_image_quality: int
    compression: str


EVERYTHING = 10**9
FULL = CutPlan(
    transparency=True,
    image_colours=None,
    clip_concepts=EVERYTHING,
    motions_per_concept=1,
    clip_crf=14,
    recorded_prompts=EVERYTHING,
    recorded_max_seconds=19.5,
    english_concepts=EVERYTHING,
    english_voices=4,
    mandarin_concepts=EVERYTHING,
    speech_kilobits=None,
    text_bytes={"bible": EVERYTHING, "plays": EVERYTHING, "devil": EVERYTHING, "glosses": 3_000_000, "zh": 8_000_000},
    pages=EVERYTHING,
    page_image_pixels=128,
    page_image_quality=90,
    compression="none",
)
SAMPLE = CutPlan(
    transparency=False,
    image_colours=128,
    clip_concepts=400,
    motions_per_concept=1,
    clip_crf=20,
    recorded_prompts=200,
    recorded_max_seconds=5.0,
    english_concepts=500,
    english_voices=2,
    mandarin_concepts=320,
    speech_kilobits=16,
    text_bytes={"bible": 3_200_000, "plays": 2_400_000, "devil": 400_000, "glosses": 600_000, "zh": 1_800_000},
    pages=EVERYTHING,
    page_image_pixels=96,
    page_image_quality=88,
    compression="packed",
)
CUTS = {"sample": SAMPLE, "full": FULL}
