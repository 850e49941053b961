"""Pictures and clips of a corpus as uint8 tensors in memory, their labels, and the augmentation of codec training."""

from __future__ import annotations

import collections
import math
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from ernie5.data.decode import decode_image, decode_video
from ernie5.data.samples import SampleMeta
from ernie5.data.shards import Corpus, list_shards, open_corpus
from ernie5.errors import DataError

MIN_LABEL_COUNT = 5
"""Labels of fewer samples teach nothing and are left out."""


@dataclass(frozen=True)
class VisualSet:
    """One split. pictures [N, 3, P, P] uint8; clips [M, 3, F, P, P] uint8; *_labels [N or M, L] fp32 in {0, 1}."""

    pictures: torch.Tensor
    clips: torch.Tensor
    picture_labels: torch.Tensor
    clip_labels: torch.Tensor
    label_names: tuple[str, ...]

    def to(self, device: torch.device) -> VisualSet:
        """The same set with its tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)


def load_visual_set(
    shards: tuple[str, ...], *, split: str, pixels: int, frames: int, label_names: tuple[str, ...] | None = None
) -> VisualSet:
    """Decode every picture and clip of `split` (pages give their pictures, unlabelled).

    label_names: columns of the label matrices, None to collect them here. Raises DataError when there is no picture;
    undecodable media are skipped.
    """
    corpus = open_corpus(list_shards(shards), split=split)
    pictures, picture_words = _read_all(corpus, tasks=("image", "page"), pixels=pixels, frames=frames)
    clips, clip_words = _read_all(corpus, tasks=("video",), pixels=pixels, frames=frames)
    if not pictures:
        raise DataError(f"The {split} split of the shards holds no pictures to train a visual tokenizer on.")
    if label_names is None:
        label_names = _frequent([*picture_words, *clip_words])
    empty = torch.zeros(0, 3, frames, pixels, pixels, dtype=torch.uint8)
    return VisualSet(
        torch.stack(pictures),
        torch.stack(clips) if clips else empty,
        _label_matrix(picture_words, label_names),
        _label_matrix(clip_words, label_names),
        label_names,
    )


def _read_all(
    corpus: Corpus, *, tasks: tuple[str, ...], pixels: int, frames: int
) -> tuple[list[torch.Tensor], list[frozenset[str]]]:
    tensors, words = [], []
    for task in tasks:
        for ref in corpus.samples(task) if task in corpus.tasks() else ():
            sample = corpus.read(ref)
            labels = labels_of(sample.meta) if task != "page" else frozenset()
            for media in sample.media:
                try:
                    if task == "video":
                        decoded = decode_video(media.data, pixels=pixels, frames=frames, name=sample.key)
                    else:
                        decoded = decode_image(media.data, pixels=pixels, name=sample.key)
                except DataError:
                    continue
                tensors.append(((decoded + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8))
                words.append(labels)
    return tensors, words


def labels_of(meta: SampleMeta) -> frozenset[str]:
    """The labels that the semantic branch predicts: keywords, group, subgroup and motion, told apart by a prefix."""
    labels = {f"keyword/{word}" for word in meta.keywords}
    for kind, value in (("group", meta.group), ("subgroup", meta.subgroup), ("motion", meta.motion)):
        if value:
            labels.add(f"{kind}/{value}")
    return frozenset(labels)


def _frequent(words: list[frozenset[str]]) -> tuple[str, ...]:
    counts = collections.Counter(word for labels in words for word in labels)
    return tuple(sorted(word for word, count in counts.items() if count >= MIN_LABEL_COUNT))


def _label_matrix(words: list[frozenset[str]], names: tuple[str, ...]) -> torch.Tensor:
    column = {name: k for k, name in enumerate(names)}
    matrix = torch.zeros(len(words), len(names))
    for row, labels in enumerate(words):
        for label in labels:
            if label in column:
                matrix[row, column[label]] = 1.0
    return matrix


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> fp32 in [-1, 1], same shape."""
    return pixels.float() / 127.5 - 1.0


def vary(video: torch.Tensor, *, share: float, generator: torch.Generator) -> torch.Tensor:
    """Augment a `share` of the clips [B, 3, F, H, W] (on the generator's device); of the others, half are mirrored."""
    batch = video.shape[0]
    draw = torch.rand(batch, 2, generator=generator, device=generator.device)
    chosen, mirrored = draw[:, 0] < share, draw[:, 1] < 0.5
    video = torch.where(mirrored[:, None, None, None, None], video.flip(-1), video)
    if chosen.any():
        video[chosen] = augment(video[chosen], generator=generator)
    return video


def augment(video: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """Flip, scale, rotate, shift and recolour clips [B, 3, F, H, W] in [-1, 1]; one draw per clip, edges repeated."""
    batch = video.shape[0]

    def draw(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, generator=generator, device=generator.device)

    zoom = torch.where(draw(0, 1) < 0.5, draw(0.85, 1.25), 1.0)
    angle = torch.where(draw(0, 1) < 0.25, draw(-0.25, 0.25), 0.0)
    mirror = torch.where(draw(0, 1) < 0.5, 1.0, -1.0)
    cosine, sine = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack(
        [torch.stack([mirror * cosine, -sine, draw(-0.15, 0.15)], 1),
         torch.stack([mirror * sine, cosine, draw(-0.15, 0.15)], 1)], 1
    )
    frames = video.transpose(1, 2).flatten(1, 2)
    grid = functional.affine_grid(theta, frames.shape, align_corners=False)
    frames = functional.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)
    moved = frames.unflatten(1, (video.shape[2], 3)).transpose(1, 2)
    return _recolour(moved, generator=generator)


def _recolour(video: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """An eighth of the clips: channels permuted; a seventh: contrast, and shade per channel; 3 %: inverted."""
    batch = video.shape[0]

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=generator, device=generator.device)

    choice = draw(3)
    orders = torch.where(choice[:, :1] < 0.125, draw(3).argsort(1), torch.arange(3, device=video.device))
    video = video.gather(1, orders[:, :, None, None, None].expand_as(video))
    gain = 1.0 - 0.4 * draw(1, 1, 1, 1)
    shade = (1.0 - gain) * (2.0 * draw(3, 1, 1, 1) - 1.0)
    changed = (choice[:, 1] < 0.14)[:, None, None, None, None]
    video = torch.where(changed, video * gain + shade, video)
    inverted = (choice[:, 2] < 0.03)[:, None, None, None, None]
    return torch.where(inverted, -video, video)


def resize_video(video: torch.Tensor, *, pixels: int) -> torch.Tensor:
    """[B, 3, F, P, P] -> [B, 3, F, pixels, pixels], antialiased by area."""
    if video.shape[-1] == pixels:
        return video
    frames = video.transpose(1, 2).flatten(0, 1)
    mode = "area" if pixels < video.shape[-1] and not math.fmod(video.shape[-1], pixels) else "bilinear"
    antialias = mode == "bilinear"
    frames = functional.interpolate(frames, size=(pixels, pixels), mode=mode, antialias=antialias)
    return frames.unflatten(0, (video.shape[0], -1)).transpose(1, 2)
