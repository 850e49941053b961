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
    token_ids, kinds, positions, document_ids, intervals = _columns(rows, layout=layout)
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


def _columns(rows: Sequence[Row], *, layout: Layout) -> tuple[torch.Tensor, ...]:
    """token_ids [B, T], kinds [B, T], positions [B, T, 3], document_ids [B, T], intervals [B, T, 4]."""
    tokens, num_rows = layout.sequence_tokens, len(rows)
    token_ids = torch.full((num_rows * tokens,), layout.pad_id, dtype=torch.int64)
    kinds = torch.full((num_rows * tokens,), int(TokenKind.PADDING), dtype=torch.int64)
    positions = torch.zeros(num_rows * tokens, 3)
    document_ids = torch.full((num_rows * tokens,), -1, dtype=torch.int32)
    own = torch.arange(tokens, dtype=torch.int32).repeat(num_rows)
    intervals = torch.stack([own, torch.zeros_like(own), torch.zeros_like(own), own + 1], dim=1)
    for row, parts in enumerate(rows):
        lengths = torch.tensor([document.length for document in parts])
        total = int(lengths.sum())
        if total > tokens:
            raise ValueError(f"documents of {total} positions do not fit a row of {tokens}")
        if not total:
            continue
        place = slice(row * tokens, row * tokens + total)
        token_ids[place] = torch.cat([document.token_ids for document in parts])
        kinds[place] = torch.cat([document.kinds for document in parts])
        positions[place] = torch.cat([document.positions for document in parts])
        document_ids[place] = torch.arange(len(parts), dtype=torch.int32).repeat_interleave(lengths)
        shift = (lengths.cumsum(0) - lengths).to(torch.int32).repeat_interleave(lengths)
        seen = torch.cat([document.intervals for document in parts])
        hidden = shift * (seen[:, 2] > 0)
        intervals[place] = seen + torch.stack([shift, hidden, hidden, shift], dim=1)
    shape = (num_rows, tokens)
    return tuple(column.unflatten(0, shape) for column in (token_ids, kinds, positions, document_ids, intervals))


def _shifted(placed: list[tuple[int, Document]], pick: Callable[[Document], R], record: type[R]) -> R:
    """Join one record of all documents; `rows` become flat positions of the batch."""
    parts = [(start, pick(document)) for start, document in placed]
    # Most documents lack most media: one of the empty ones stands for all when no document has any.
    parts = [(start, part) for start, part in parts if part.rows.numel()] or parts[:1]
    joined = {
        field.name: torch.cat([vars(part)[field.name] for _, part in parts]) for field in dataclasses.fields(record)
    }
    counts = torch.tensor([part.rows.numel() for _, part in parts])
    joined["rows"] += torch.tensor([start for start, _ in parts]).repeat_interleave(counts)
    return record(**joined)


def _patches(
    placed: list[tuple[int, Document]], pick: Callable[[Document], VisualPatches], offsets: list[int]
) -> VisualPatches:
    joined = _shifted(placed, pick, VisualPatches)
    counts = torch.tensor([pick(document).rows.numel() for _, document in placed])
    joined.frame_ids.add_(torch.tensor(offsets).repeat_interleave(counts)[:, None])
    return joined
