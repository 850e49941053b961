"""Which blocks of keys a block of queries must look at, and the reverse, as lists made on the device.

A block of keys is summed up by the extremes of its columns' intervals; a pair of blocks is then hidden, partly visible
or wholly visible by comparing eight numbers. The lists hold the partly visible blocks first, which need the mask, and
the wholly visible ones after them, which do not; hidden ones cost nothing. No word from the host is needed.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ..launch import ceil_div

SUMMARY = 8
CHUNK = 128
FAR = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class BlockLists:
    """others [B, N, M] int32: for each of N blocks its visible ones among M; counts [B, N, 2]: (partial, all)."""

    others: torch.Tensor
    counts: torch.Tensor


@triton.jit
def summary_kernel(intervals, summary, keys, BLOCK_KEYS: tl.constexpr):
    """Extremes of the intervals of one block of keys; columns past the last key are visible to nobody."""
    FAR: tl.constexpr = 2147483647
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    inside = key < keys
    place = intervals + (batch * keys + key) * 4
    visible_from = tl.load(place, mask=inside, other=FAR)
    hidden_from = tl.load(place + 1, mask=inside, other=0)
    hidden_until = tl.load(place + 2, mask=inside, other=0)
    visible_until = tl.load(place + 3, mask=inside, other=0)
    hides = hidden_from < hidden_until
    target = summary + (batch * tl.num_programs(0) + block) * 8
    tl.store(target, tl.min(visible_from))
    tl.store(target + 1, tl.max(visible_from))
    tl.store(target + 2, tl.min(visible_until))
    tl.store(target + 3, tl.max(visible_until))
    tl.store(target + 4, tl.min(tl.where(hides, hidden_from, FAR)))
    tl.store(target + 5, tl.max(tl.where(hides, hidden_from, FAR)))
    tl.store(target + 6, tl.min(tl.where(hides, hidden_until, 0)))
    tl.store(target + 7, tl.max(tl.where(hides, hidden_until, 0)))


@triton.jit
def visibility(summary, first, last):
    """(any, whole) visibility of rows first..last by the key block that `summary` points at; never hides too much."""
    none = (last < tl.load(summary)) | (first >= tl.load(summary + 3))
    none |= (tl.load(summary + 5) <= first) & (last < tl.load(summary + 6))
    whole = (tl.load(summary + 1) <= first) & (last < tl.load(summary + 2))
    whole &= (last < tl.load(summary + 4)) | (tl.load(summary + 7) <= first)
    return ~none, whole & ~none


@triton.jit
def lists_kernel(
    summary, others, counts, query_blocks, key_blocks, queries, query_start,
    BY_QUERY: tl.constexpr, BLOCK_QUERIES: tl.constexpr, CHUNK: tl.constexpr,
):
    """The list of one block of queries (BY_QUERY) or of keys: ascending partial blocks, then ascending whole ones."""
    own, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    number = key_blocks if BY_QUERY else query_blocks
    base = others + (batch * tl.num_programs(0) + own) * number
    filled = 0
    for stage in tl.static_range(2):
        for start in range(0, number, CHUNK):
            other = start + tl.arange(0, CHUNK)
            inside = other < number
            safe = tl.minimum(other, number - 1)
            query_block = own + safe * 0 if BY_QUERY else safe
            key_block = safe if BY_QUERY else own + safe * 0
            first = query_start + query_block * BLOCK_QUERIES
            last = query_start + tl.minimum((query_block + 1) * BLOCK_QUERIES, queries) - 1
            some, whole = visibility(summary + (batch * key_blocks + key_block) * 8, first, last)
            wanted = inside & some & (whole if stage == 1 else ~whole)
            rank = tl.cumsum(wanted.to(tl.int32), 0)
            tl.store(base + filled + rank - 1, other, mask=wanted)
            filled += tl.sum(wanted.to(tl.int32))
        tl.store(counts + (batch * tl.num_programs(0) + own) * 2 + stage, filled)


def summarise_keys(intervals: torch.Tensor, *, block_keys: int) -> torch.Tensor:
    """Extremes [B, key blocks, 8] of intervals [B, S, 4] int32, from which lists of either side are made."""
    batch, keys, _ = intervals.shape
    summary = intervals.new_empty(batch, ceil_div(keys, block_keys), SUMMARY)
    summary_kernel[(summary.shape[1], batch)](intervals, summary, keys, block_keys, num_warps=1)
    return summary


def block_lists(
    summary: torch.Tensor, *, queries: int, query_start: int, block_queries: int, by_query: bool
) -> BlockLists:
    """Key blocks by query block, or query blocks by key block, for a summary of `summarise_keys`."""
    batch, key_blocks, _ = summary.shape
    query_blocks = ceil_div(queries, block_queries)
    own, other = (query_blocks, key_blocks) if by_query else (key_blocks, query_blocks)
    lists = BlockLists(summary.new_empty(batch, own, other), summary.new_empty(batch, own, 2))
    lists_kernel[(own, batch)](
        summary, lists.others, lists.counts, query_blocks, key_blocks, queries, query_start,
        by_query, block_queries, CHUNK, num_warps=1,
    )
    return lists


def everything_visible(*, batch: int, keys: int, device: torch.device) -> torch.Tensor:
    """Intervals [B, S, 4] under which every row sees every key."""
    intervals = torch.zeros(batch, keys, 4, dtype=torch.int32, device=device)
    intervals[..., 3] = FAR
    return intervals
