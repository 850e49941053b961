"""Packed rows to a Batch: columns side by side, sparse records joined with their rows shifted to b*T + t."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ernie5.data.document import Document
from ernie5.records import (
    AudioFrames,
    Batch,
    BitTargets,
    SpeakerCells,
    TextTargets,
    TokenKind,
    VisualCells,
    VisualPatches,
)

R = TypeVar("R")
Row = tuple[Document, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What collating needs to know: sequence_tokens T of a row, the padding id, and the number of MTP modules."""

    sequence_tokens: int
    pad_id: int
    mtp_depth: int


def collate_rows(rows: Sequence[Row], *, layout: Layout) -> Batch:
    """Join B rows of documents, each at most T positions long, into one Batch (see records.py for shapes).

    Padding gets kind PADDING, document -1, position 0, and sees and is seen by itself alone.
    """
    tokens = layout.sequence_tokens
    placed = [(row * tokens + start, document) for row, parts in enumerate(rows) for start, document in _starts(parts)]
    frame_offsets = _frame_offsets(placed)
    columns = [_columns(parts, layout=layout) for parts in rows]
    token_ids, kinds, positions, document_ids, intervals = (torch.stack(group) for group in zip(*columns, strict=True))
    return Batch(
        token_ids=token_ids,
        kinds=kinds,
        positions=positions,
        document_ids=document_ids,
        intervals=intervals,
        text_targets=_shifted(placed, lambda document: document.text_targets, TextTargets),
        mtp_targets=mtp_targets(token_ids, kinds=kinds, document_ids=document_ids, depth=layout.mtp_depth),
        image_patches=_patches(placed, lambda document: document.image_patches, frame_offsets),
        video_patches=_patches(placed, lambda document: document.video_patches, frame_offsets),
        visual_cells=_shifted(placed, lambda document: document.visual_cells, VisualCells),
        bit_targets=_shifted(placed, lambda document: document.bit_targets, BitTargets),
        audio_frames=_shifted(placed, lambda document: document.audio_frames, AudioFrames),
        audio_targets=_shifted(placed, lambda document: document.audio_targets, AudioFrames),
        speakers=_shifted(placed, lambda document: document.speakers, SpeakerCells),
        sample_keys=tuple(tuple(document.key for document in parts) for parts in rows),
    )


def mtp_targets(
    token_ids: torch.Tensor, *, kinds: torch.Tensor, document_ids: torch.Tensor, depth: int
) -> tuple[TextTargets, ...]:
    """Targets of MTP modules d = 0..depth-1: position t predicts token t+d+2 (SPEC section 1).

    A term counts only where t .. t+d+2 lie in one document and t+1 .. t+d+2 are text. Position t itself may be the
    last cell of a drawn picture or the last frame of speech, but never a picture or clip to be understood: those
    positions carry no loss at all (SPEC section 2). token_ids, kinds, document_ids: [B, T].
    """
    num_rows, tokens = token_ids.shape
    result = []
    for module in range(depth):
        reach = module + 2
        counts = torch.zeros(num_rows, tokens, dtype=torch.bool)
        if tokens > reach:
            inside = tokens - reach
            seen = (kinds == TokenKind.IMAGE_UNDERSTANDING) | (kinds == TokenKind.VIDEO_UNDERSTANDING)
            good = (document_ids[:, :inside] == document_ids[:, reach:]) & ~seen[:, :inside]
            for step in range(1, reach + 1):
                good = good & (kinds[:, step : step + inside] == TokenKind.TEXT)
            counts[:, :inside] = good
        rows = counts.flatten().nonzero().flatten()
        result.append(TextTargets(rows=rows, ids=token_ids.flatten()[rows + reach]))
    return tuple(result)


def _starts(parts: Row) -> list[tuple[int, Document]]:
    start, placed = 0, []
    for document in parts:
        placed.append((start, document))
        start += document.length
    return placed


def _frame_offsets(placed: list[tuple[int, Document]]) -> list[int]:
    offsets, total = [], 0
    for _, document in placed:
        offsets.append(total)
        total += document.num_frames
    return offsets


def _columns(parts: Row, *, layout: Layout) -> tuple[torch.Tensor, ...]:
    """token_ids [T], kinds [T], positions [T, 3], document_ids [T], intervals [T, 4] of one row."""
    tokens = layout.sequence_tokens
    token_ids = torch.full((tokens,), layout.pad_id, dtype=torch.int64)
    kinds = torch.full((tokens,), int(TokenKind.PADDING), dtype=torch.int64)
    positions = torch.zeros(tokens, 3)
    document_ids = torch.full((tokens,), -1, dtype=torch.int32)
    intervals = torch.zeros(tokens, 4, dtype=torch.int32)
    intervals[:, 0] = torch.arange(tokens)
    intervals[:, 3] = intervals[:, 0] + 1
    for number, (start, document) in enumerate(_starts(parts)):
        stop = start + document.length
        if stop > tokens:
            raise ValueError(f"documents of {stop} positions do not fit a row of {tokens}")
        token_ids[start:stop] = document.token_ids
        kinds[start:stop] = document.kinds
        positions[start:stop] = document.positions
        document_ids[start:stop] = number
        hidden = document.intervals[:, 2:3] > 0
        shift = torch.tensor([[1, 0, 0, 1]]) * start + torch.tensor([[0, 1, 1, 0]]) * start * hidden
        intervals[start:stop] = document.intervals + shift.to(torch.int32)
    return token_ids, kinds, positions, document_ids, intervals


def _shifted(placed: list[tuple[int, Document]], pick: Callable[[Document], R], record: type[R]) -> R:
    """Join one record of all documents; `rows` become flat positions of the batch."""
    parts = [(start, pick(document)) for start, document in placed]
    joined = {}
    for field in dataclasses.fields(record):
        values = [vars(part)[field.name] for _, part in parts]
        if field.name == "rows":
            values = [rows + start for (start, _), rows in zip(parts, values, strict=True)]
        joined[field.name] = torch.cat(values)
    return record(**joined)


def _patches(
    placed: list[tuple[int, Document]], pick: Callable[[Document], VisualPatches], offsets: list[int]
) -> VisualPatches:
    joined = _shifted(placed, pick, VisualPatches)
    frames = [pick(document).frame_ids + offset for (_, document), offset in zip(placed, offsets, strict=True)]
    return dataclasses.replace(joined, frame_ids=torch.cat(frames))
