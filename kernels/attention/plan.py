"""Which keys each chunk of query rows needs: made once per batch from row intervals, used by every layer.

Chunks end at document borders where that leaves them large enough, so short packed documents cost their own length
squared and no more. They are for the back end `torch` alone and made when it first asks, which reads the intervals on
the host: one synchronisation per batch on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .reference import dense_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CHUNK_ROWS = 256
SMALLEST_CHUNK = 64
KEPT_MASK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Query rows [query_from, query_until) of batch row `row` need keys [key_from, key_until) and no others.

    Queries count from the first query, keys from the first key. hidden [queries, keys] bool marks what may not be
    seen; None where it is remade on use (long rows) or where `is_full`, nothing being hidden. first_row: the row that
    query_from has in the numbering of the intervals.
    """

    row: int
    query_from: int
    query_until: int
    key_from: int
    key_until: int
    first_row: int
    is_full: bool
    hidden: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class DenseMask:
    """visible [B, T, S] bool, True also where `blind` [B, T] marks a row that sees nothing (None: there is none)."""

    visible: torch.Tensor
    blind: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """intervals [B, S, 4] on the device of the tensors (None: everything is visible).

    `chunks`, `dense` and `blocks` are the mask as our own path in PyTorch and PyTorch's own attention want it, made on
    first use and kept for all layers. is_piecewise: the queries are not one run of rows, which `attend` alone can take.
    """

    intervals: torch.Tensor | None
    query_start: int
    query_tokens: int
    make_chunks: Callable[[], list[Chunk]]
    is_piecewise: bool = False

    @functools.cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The queries in runs, each with the keys it needs, masks on the device of the intervals."""
        return tuple(
            c if c.hidden is None
            else dataclasses.replace(c, hidden=c.hidden.to(self.intervals.device, non_blocking=True))
            for c in self.make_chunks()
        )

    @functools.cached_property
    def dense(self) -> DenseMask | None:
        """The whole mask; None where everything is visible."""
        if self.intervals is None:
            return None
        visible = dense_mask(self.intervals, query_start=self.query_start, query_tokens=self.query_tokens)
        blind = ~visible.any(-1)
        return DenseMask(visible | blind.unsqueeze(-1), blind) if bool(blind.any()) else DenseMask(visible, None)

    @functools.cached_property
    def blocks(self) -> BlockMask | None:
        """The mask as flex_attention's blocks; None where everything is visible."""
        if self.intervals is None:
            return None
        from .flex import block_mask  # only then PyTorch's flex_attention is loaded

        return block_mask(self.intervals, query_start=self.query_start, query_tokens=self.query_tokens)

    def hidden_of(self, chunk: Chunk) -> torch.Tensor | None:
        """The mask [queries, keys] of a chunk, True where hidden; None where all is visible."""
        if chunk.is_full or chunk.hidden is not None:
            return chunk.hidden
        last_row = chunk.first_row + chunk.query_until - chunk.query_from
        rows = torch.arange(chunk.first_row, last_row, device=self.intervals.device)
        return hidden_mask(self.intervals[chunk.row, chunk.key_from : chunk.key_until], rows=rows)


def hidden_mask(intervals: torch.Tensor, *, rows: torch.Tensor) -> torch.Tensor:
    """True [Q, S] where a row of `rows` [Q] must not see the key column with intervals [S, 4]."""
    rows = rows.to(intervals.dtype).unsqueeze(1)
    visible_from, hidden_from, hidden_until, visible_until = intervals.unbind(-1)
    return (rows < visible_from) | (rows >= visible_until) | ((hidden_from <= rows) & (rows < hidden_until))


def narrow_intervals(intervals: torch.Tensor) -> torch.Tensor:
    """[B, S, 4] int32 without gaps; a row beyond int32, such as the largest int64 for ever, stays beyond all rows."""
    if intervals.dtype == torch.int64:
        intervals = intervals.clamp(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
    return intervals.to(torch.int32).contiguous()


def plan_attention(
    intervals: torch.Tensor | None,
    *,
    batch_rows: int,
    query_tokens: int,
    key_tokens: int,
    chunk_rows: int = CHUNK_ROWS,
) -> AttentionPlan:
    """Plan attention of the last `query_tokens` of `key_tokens` positions.

    intervals [B, S, 4] integer over all S = key_tokens columns, rows and columns counted from the first key: row i sees
    key j where visible_from <= i < visible_until and not hidden_from <= i < hidden_until, the four of j being
    (visible_from, hidden_from, hidden_until, visible_until). Causal documents: (j, 0, 0, end of j's document). None
    lets every query see every key, which is right for one token or one visual block after a cache. Raises ValueError
    for more queries than keys.
    """
    query_start = key_tokens - query_tokens
    if query_start < 0:
        raise ValueError(
            f"plan_attention: {query_tokens} queries cannot be the last of {key_tokens} positions. key_tokens "
            "counts the queries' own positions beside those before them"
        )

    def everything() -> list[Chunk]:
        return [
            Chunk(row, start, min(start + chunk_rows, query_tokens), 0, key_tokens, start, True, None)
            for row in range(batch_rows)
            for start in range(0, query_tokens, chunk_rows)
        ]

    def needed() -> list[Chunk]:
        host = intervals.detach().cpu()
        keep = batch_rows * query_tokens * min(key_tokens, 4 * chunk_rows) <= KEPT_MASK_BYTES
        return [
            _chunk(host[row], row=row, start=start, end=end, query_start=query_start, keep=keep)
            for row in range(batch_rows)
            for start, end in _cuts(host[row, :, 3], first=query_start, last=key_tokens, chunk_rows=chunk_rows)
        ]

    return AttentionPlan(intervals, query_start, query_tokens, everything if intervals is None else needed)


def plan_piecewise(
    intervals: torch.Tensor,
    *,
    pieces: tuple[tuple[int, int], ...],
    keep_masks: bool = True,
    chunk_rows: int = CHUNK_ROWS,
) -> AttentionPlan:
    """Plan queries that are several contiguous runs of the rows, over any selection of key columns.

    intervals [B, S, 4] of the selected columns, in the order of the keys; pieces: (first row, rows) of each run, which
    stand one after another among the queries. Every query is covered, also where none of these keys is visible.
    """

    def chunks() -> list[Chunk]:
        host = intervals.detach().cpu()
        return [
            _chunk(
                host[row], row=row, start=first + start, end=first + min(start + chunk_rows, rows),
                query_start=first - before, keep=keep_masks,
            )
            for row in range(host.shape[0])
            for (first, rows), before in zip(pieces, local, strict=True)
            for start in range(0, rows, chunk_rows)
        ]

    local = [sum(rows for _, rows in pieces[:index]) for index in range(len(pieces))]
    return AttentionPlan(intervals, 0, sum(rows for _, rows in pieces), chunks, is_piecewise=True)


def _cuts(visible_until: torch.Tensor, *, first: int, last: int, chunk_rows: int) -> list[tuple[int, int]]:
    borders = (visible_until[1:] != visible_until[:-1]).nonzero().flatten().add(1).tolist()
    cuts, start = [], first
    for border in [*borders, last]:
        if border - start >= SMALLEST_CHUNK or border == last:
            pieces = -(-(border - start) // chunk_rows)
            size = -(-(border - start) // max(1, pieces))
            cuts.extend((begin, min(begin + size, border)) for begin in range(start, border, max(1, size)))
            start = max(start, border)
    return cuts


def _chunk(columns: torch.Tensor, *, row: int, start: int, end: int, query_start: int, keep: bool) -> Chunk:
    needed = ((columns[:, 0] < end) & (columns[:, 3] > start)).nonzero().flatten()
    key_from, key_until = (int(needed[0]), int(needed[-1]) + 1) if needed.numel() else (0, 1)
    hidden = hidden_mask(columns[key_from:key_until], rows=torch.arange(start, end, device=columns.device))
    is_full = not bool(hidden.any())
    kept = hidden if keep and not is_full else None
    return Chunk(row, start - query_start, end - query_start, key_from, key_until, start, is_full, kept)
