"""Batches of random documents without any tokenizer or corpus: for tests, benchmarks and dry runs.

They go through the same builder and collation as real data, in awkward shapes: odd lengths, pictures that are not
square, a clip, many short documents, padding at the end.
"""

from __future__ import annotations

import random

import torch

from ernie5.data.collate import Layout, Row, collate_rows
from ernie5.data.config import CorruptionConfig
from ernie5.data.corrupt import encode_scales
from ernie5.data.document import SPEAKER_FEATURES, Document, DocumentBuilder, Shapes
from ernie5.data.drawing import draw_codes
from ernie5.data.draws import key_of
from ernie5.data.patches import merge_patches
from ernie5.records import Batch
from ernie5.tokenizers.visual.scales import DEFAULT_SIZES, scale_schedule
from ernie5.tokenizers.vocab import Vocab

TASKS = (
    "text",
    "image_to_text",
    "text_to_image",
    "video_to_text",
    "text_to_video",
    "audio_to_text",
    "text_to_audio",
    "page",
)


def synthetic_batch(
    vocab: Vocab,
    *,
    shapes: Shapes,
    rows: int,
    sequence_tokens: int,
    seed: int,
    mtp_depth: int = 1,
    tasks: tuple[str, ...] = TASKS,
) -> Batch:
    """A Batch of `rows` rows that cycle through `tasks`; equal arguments give equal batches.

    Documents that do not fit the rest of a row are left out; what stays free is padding. `shapes` must fit the model
    (ModelConfig.visual and .audio), `vocab.size_head` its vocab_size.
    """
    packed = []
    for row in range(rows):
        draws = random.Random(key_of("synthetic", seed, row))
        packed.append(_fill_row(vocab, shapes=shapes, tasks=tasks, length=sequence_tokens, draws=draws, first=row))
    return collate_rows(packed, layout=Layout(sequence_tokens, vocab.pad, mtp_depth))


def synthetic_document(vocab: Vocab, *, shapes: Shapes, task: str, seed: int, text_tokens: int = 7) -> Document:
    """One random document of `task` (a name of TASKS)."""
    draws = random.Random(key_of("synthetic document", seed, task))
    generator = torch.Generator().manual_seed(key_of("synthetic tensors", seed, task))
    builder = DocumentBuilder(f"synthetic-{task}-{seed}", task=task, vocab=vocab, shapes=shapes)
    words = [draws.randrange(vocab.text_size) for _ in range(text_tokens)]
    source, _, target = task.partition("_to_")
    builder.text([vocab.bos])
    if task == "text":
        builder.text(words)
    elif task == "page":
        for _ in range(2):
            builder.text(words)
            _understand("image", builder, vocab=vocab, shapes=shapes, draws=draws, generator=generator)
    elif target == "text":
        _understand(source, builder, vocab=vocab, shapes=shapes, draws=draws, generator=generator)
        builder.text([vocab.sep, *words])
    else:
        builder.text([*words, vocab.sep])
        _generate(target, builder, vocab=vocab, shapes=shapes, draws=draws, generator=generator)
    builder.text([vocab.eos])
    return builder.build(is_text=task == "text")


def _fill_row(
    vocab: Vocab, *, shapes: Shapes, tasks: tuple[str, ...], length: int, draws: random.Random, first: int
) -> Row:
    parts: list[Document] = []
    used, attempts = 0, 0
    while attempts < 3 * len(tasks):
        task = tasks[(first + attempts) % len(tasks)]
        room = length - used
        words = max(1, min(draws.choice((1, 3, 8, 21)), room - 2))
        document = synthetic_document(
            vocab, shapes=shapes, task=task, seed=draws.randrange(1 << 30), text_tokens=words
        )
        if document.length <= room:
            parts.append(document)
            used += document.length
        attempts += 1
    if not parts:
        parts.append(synthetic_document(vocab, shapes=shapes, task="text", seed=first, text_tokens=max(1, length - 2)))
    return tuple(parts)


def _grid(shapes: Shapes, draws: random.Random, *, is_video: bool) -> tuple[int, int]:
    """A latent grid of even sides whose schedule has at most S scales."""
    side = DEFAULT_SIZES[min(shapes.num_scales, len(DEFAULT_SIZES)) - 1] // (2 if is_video else 1)
    sides = [value for value in (2, 4, 6, 8) if value <= max(2, side)]
    return draws.choice(sides), draws.choice(sides)


def _understand(
    medium: str,
    builder: DocumentBuilder,
    *,
    vocab: Vocab,
    shapes: Shapes,
    draws: random.Random,
    generator: torch.Generator,
) -> None:
    if medium == "audio":
        codes = _codes(shapes, draws.randint(1, 9), generator)
        builder.audio(codes, generate=False)
        return
    is_video = medium == "video"
    height, width = _grid(shapes, draws, is_video=is_video)
    frames, group = (8, 4) if is_video else (1, 1)
    stride = shapes.patch_pixels
    pixels = torch.rand(3, frames, height * stride, width * stride, generator=generator) * 2 - 1
    features = torch.randn(frames, shapes.feature_channels, height, width, generator=generator)
    builder.text([vocab.bov if is_video else vocab.boi])
    builder.patches(merge_patches(pixels, features=features, frames_per_group=group), is_video=is_video)
    builder.text([vocab.eov if is_video else vocab.eoi])


def _generate(
    medium: str,
    builder: DocumentBuilder,
    *,
    vocab: Vocab,
    shapes: Shapes,
    draws: random.Random,
    generator: torch.Generator,
) -> None:
    if medium == "audio":
        builder.speaker(torch.randn(SPEAKER_FEATURES, generator=generator))
        builder.audio(_codes(shapes, draws.randint(1, 9), generator), generate=True)
        return
    is_video = medium == "video"
    grid = _grid(shapes, draws, is_video=is_video)
    latents = torch.randn(shapes.bits, 2 if is_video else 1, *grid, generator=generator)
    schedule = scale_schedule(*grid)
    codes = encode_scales(latents, schedule=schedule, config=CorruptionConfig(), generator=generator)
    drawing = draw_codes(codes, schedule=schedule, num_scales=shapes.num_scales)
    builder.draw(drawing, is_video=is_video, hide_after={})
    builder.finish_picture(is_video=is_video)


def _codes(shapes: Shapes, frames: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(shapes.audio_codes, (frames, shapes.audio_levels), generator=generator)
