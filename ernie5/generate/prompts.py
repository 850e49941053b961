"""What a corpus sample gives to a prompt: its words and its decoded medium."""

from __future__ import annotations

import torch

from ernie5.data.config import DataConfig
from ernie5.data.decode import decode_audio, decode_image, decode_video
from ernie5.data.samples import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, Sample
from ernie5.errors import DataError

SUFFIXES = {"image": IMAGE_SUFFIXES, "video": VIDEO_SUFFIXES, "audio": AUDIO_SUFFIXES}


def words_of_sample(sample: Sample, *, data: DataConfig) -> str:
    """What training reads with it: the transcript of speech; else the first caption in a language of the run, or any
    caption, or the keywords."""
    meta = sample.meta
    if meta.task == "audio":
        return meta.transcript or ""
    for language in data.caption_languages:
        found = meta.caption(language)
        if found:
            return found
    return meta.captions[0].text if meta.captions else ", ".join(meta.keywords)


def decode_sample(sample: Sample, *, medium: str, data: DataConfig) -> torch.Tensor:
    """image [3, H, W], video [3, F, H, W] in [-1, 1], or audio [samples]; raises DataError naming the sample."""
    found = next((item for item in sample.media if item.name in SUFFIXES[medium]), None)
    if found is None:
        raise DataError(f"sample {sample.key} has no {medium} member. Build the shard again.")
    if medium == "image":
        return decode_image(found.data, pixels=data.image_pixels, name=sample.key)
    if medium == "video":
        return decode_video(found.data, pixels=data.video_pixels, frames=data.video_frames, name=sample.key)
    return decode_audio(found.data, name=sample.key)
