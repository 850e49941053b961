"""Attention under row intervals in Triton: the flash recurrence over the visible blocks alone (arXiv:2205.14135).

Powers of two throughout: P = 2^(c S - lse) with c = scale log2 e. The backward pass has one kernel for dK and dV, which
sums over the query heads of a key head in registers, and one for dQ: no atomic addition, so it repeats bit for bit.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """queries x keys of a block, and how a chip runs it."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_blocks(*, capability: int, width: int, element_bytes: int, part: str) -> AttentionBlocks:
    """Blocks of `part` (forward, keys or queries: whose gradient) that compile without spilling (tools/aot_report).

    On sm_90 each group of four warps owns 64 rows of the result: 128 keys for dK and dV, 128 queries for dQ. Half of
    that made the groups share rows and halved their columns, to 16 in scores (README, measured on a GPU).
    """
    if element_bytes == 4 or width > 128:
        return AttentionBlocks(32, 32, warps=4, stages=1)
    if capability < 90:
        return AttentionBlocks(64, 32, warps=4, stages=2) if part == "forward" else AttentionBlocks(32, 64, 8, 2)
    if part == "forward":
        return AttentionBlocks(128, 64, warps=8, stages=3)
    if capability < 100:
        return AttentionBlocks(32, 128, 8, 2) if part == "keys" else AttentionBlocks(128, 64, warps=8, stages=3)
    return AttentionBlocks(32, 64, 8, 2) if part == "keys" else AttentionBlocks(64, 64, warps=8, stages=2)


@triton.jit
def row_and_head(heads):
    """(row of the batch, head) of this program: one number taken apart, as two dK and dV would need 4 registers more,
    and have 255 then (sm_90). CUDA allows no launch of rows times heads beyond 65,535 in one size of its grid."""
    pair = tl.program_id(2) * heads + tl.program_id(1)
    return (pair // heads).to(tl.int64), pair % heads


@triton.jit
def visible_pairs(intervals, row, key, keys):
    """[rows, keys]: whether the row sees the key."""
    inside = key < keys
    place = intervals + key.to(tl.int64) * 4
    visible_from = tl.load(place, mask=inside, other=2147483647)[None, :]
    hidden_from = tl.load(place + 1, mask=inside, other=0)[None, :]
    hidden_until = tl.load(place + 2, mask=inside, other=0)[None, :]
    visible_until = tl.load(place + 3, mask=inside, other=0)[None, :]
    row = row[:, None]
    return (row >= visible_from) & (row < visible_until) & ~((row >= hidden_from) & (row < hidden_until))


@triton.jit
def rows_of(base, row, rows, stride, width, BLOCK_WIDTH: tl.constexpr):
    """[rows, BLOCK_WIDTH] of a matrix with rows `stride` apart, zeros outside."""
    lane = tl.arange(0, BLOCK_WIDTH)
    place = base + row.to(tl.int64)[:, None] * stride + lane[None, :]
    return tl.load(place, mask=(row < rows)[:, None] & (lane < width)[None, :], other=0.0)


@triton.jit
def forward_blocks(
    peak, mass, total, q, key, value, intervals, row, others, begin, end, keys, key_stride, value_stride, width, factor,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """Fold the listed key blocks into the running maximum (before `factor` > 0), mass and weighted sum of values."""
    for index in range(begin, end):
        column = tl.load(others + index) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = rows_of(key, column, keys, key_stride, width, BLOCK_WIDTH)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(visible_pairs(intervals, row, column, keys), scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        bound = tl.where(higher == float("-inf"), 0.0, higher * factor)
        weights = tl.exp2(scores * factor - bound[:, None])  # one instruction: the factor waits for the difference
        shrink = tl.exp2(peak * factor - bound)
        mass = mass * shrink + tl.sum(weights, axis=1)
        v = rows_of(value, column, keys, value_stride, width, BLOCK_WIDTH)
        total = tl.dot(weights.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        peak = higher
    return peak, mass, total


@triton.jit
def attention_forward_kernel(
    query, key, value, out, lse, intervals, others, counts, queries, keys, query_start, heads, groups, width, factor,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head, list_length,
    PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """One block of queries of one head; out [B, T, H, C], lse [B, H, T] to base 2, +inf where a row sees nothing."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # under causal masks the last blocks have most to do
    batch, head = row_and_head(heads)
    group = head // (heads // groups)
    position = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    row = query_start + position
    q = rows_of(query + batch * query_batch + head * query_head, position, queries, query_row, width, BLOCK_WIDTH)
    key += batch * key_batch + group * key_head
    value += batch * value_batch + group * value_head
    intervals += batch * keys * 4
    own = batch * tl.num_programs(0) + block
    partial, every = tl.load(counts + own * 2), tl.load(counts + own * 2 + 1)
    others += own * list_length
    peak = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_QUERIES,), tl.float32)
    total = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), tl.float32)
    peak, mass, total = forward_blocks(
        peak, mass, total, q, key, value, intervals, row, others, partial, every, keys, key_row, value_row, width,
        factor, False, PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
    )
    peak, mass, total = forward_blocks(
        peak, mass, total, q, key, value, intervals, row, others, 0, partial, keys, key_row, value_row, width,
        factor, True, PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
    )
    seen = mass > 0.0
    result = total / tl.where(seen, mass, 1.0)[:, None]
    lane = tl.arange(0, BLOCK_WIDTH)
    place = ((batch * queries + position.to(tl.int64)) * heads + head)[:, None] * width + lane[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(position < queries)[:, None] & (lane < width)[None, :])
    normaliser = tl.where(seen, peak * factor + tl.log2(tl.where(seen, mass, 1.0)), float("inf"))
    tl.store(lse + (batch * heads + head) * queries + position, normaliser, mask=position < queries)


@triton.jit
def delta_kernel(grad, out, delta, rows, queries, heads, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """delta [B, H, T] = rowsum(dO * O) for dO and O [B, T, H, C]; `rows` is B T H."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (lane < width)[None, :]
    place = row[:, None] * width + lane[None, :]
    product = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    batch, token, head = row // (queries * heads), row // heads % queries, row % heads
    tl.store(delta + (batch * heads + head) * queries + token, tl.sum(product, axis=1), mask=row < rows)


@triton.jit
def key_gradient_blocks(
    grad_key, grad_value, k, v, query, grad, lse, delta, intervals, column, others, begin, end,
    queries, keys, query_start, query_row, grad_row, width, factor,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """Add the listed query blocks of one head: dV += P^T dO, dK += dS^T Q with dS = P (dO V^T - delta)."""
    for index in range(begin, end):
        position = tl.load(others + index) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        q = rows_of(query, position, queries, query_row, width, BLOCK_WIDTH)
        upstream = rows_of(grad, position, queries, grad_row, width, BLOCK_WIDTH)
        normaliser = tl.load(lse + position, mask=position < queries, other=float("inf"))
        weights = tl.exp2(tl.dot(k, q.T, input_precision=PRECISION) * factor - normaliser[None, :])
        if MASKED:
            weights = tl.where(visible_pairs(intervals, query_start + position, column, keys).T, weights, 0.0)
        grad_value = tl.dot(weights.to(upstream.dtype), upstream, grad_value, input_precision=PRECISION)
        shift = tl.load(delta + position, mask=position < queries, other=0.0)
        change = weights * (tl.dot(v, upstream.T, input_precision=PRECISION) - shift[None, :])
        grad_key = tl.dot(change.to(q.dtype), q, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def key_gradient_kernel(
    query, key, value, grad, lse, delta, grad_key, grad_value, intervals, others, counts,
    queries, keys, query_start, heads, groups, width, factor, scale,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head, list_length,
    PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """dK and dV of one block of keys of one key head, summed over the query heads that share it."""
    block = tl.program_id(0)
    batch, group = row_and_head(groups)
    column = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    k = rows_of(key + batch * key_batch + group * key_head, column, keys, key_row, width, BLOCK_WIDTH)
    v = rows_of(value + batch * value_batch + group * value_head, column, keys, value_row, width, BLOCK_WIDTH)
    intervals += batch * keys * 4
    own = batch * tl.num_programs(0) + block
    partial, every = tl.load(counts + own * 2), tl.load(counts + own * 2 + 1)
    others += own * list_length
    total_key = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)
    total_value = tl.zeros((BLOCK_KEYS, BLOCK_WIDTH), tl.float32)
    shared = heads // groups
    for head in range(group * shared, (group + 1) * shared):
        head_query = query + batch * query_batch + head * query_head
        head_grad = grad + (batch * queries * heads + head) * width
        at = (batch * heads + head) * queries
        total_key, total_value = key_gradient_blocks(
            total_key, total_value, k, v, head_query, head_grad, lse + at, delta + at, intervals, column, others,
            partial, every, queries, keys, query_start, query_row, heads * width, width, factor,
            False, PRECISION, BLOCK_QUERIES, BLOCK_WIDTH,
        )
        total_key, total_value = key_gradient_blocks(
            total_key, total_value, k, v, head_query, head_grad, lse + at, delta + at, intervals, column, others,
            0, partial, queries, keys, query_start, query_row, heads * width, width, factor,
            True, PRECISION, BLOCK_QUERIES, BLOCK_WIDTH,
        )
    lane = tl.arange(0, BLOCK_WIDTH)
    place = ((batch * keys + column.to(tl.int64)) * groups + group)[:, None] * width + lane[None, :]
    mask = (column < keys)[:, None] & (lane < width)[None, :]
    tl.store(grad_key + place, (total_key * scale).to(grad_key.dtype.element_ty), mask=mask)
    tl.store(grad_value + place, total_value.to(grad_value.dtype.element_ty), mask=mask)


@triton.jit
def query_gradient_blocks(
    total, q, upstream, normaliser, shift, key, value, intervals, row, others, begin, end, keys,
    key_stride, value_stride, width, factor,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """Add the listed key blocks: dQ += dS K."""
    for index in range(begin, end):
        column = tl.load(others + index) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = rows_of(key, column, keys, key_stride, width, BLOCK_WIDTH)
        v = rows_of(value, column, keys, value_stride, width, BLOCK_WIDTH)
        weights = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * factor - normaliser[:, None])
        if MASKED:
            weights = tl.where(visible_pairs(intervals, row, column, keys), weights, 0.0)
        change = weights * (tl.dot(upstream, v.T, input_precision=PRECISION) - shift[:, None])
        total = tl.dot(change.to(k.dtype), k, total, input_precision=PRECISION)
    return total


@triton.jit
def query_gradient_kernel(
    query, key, value, grad, lse, delta, grad_query, intervals, others, counts,
    queries, keys, query_start, heads, groups, width, factor, scale,
    query_batch, query_row, query_head, key_batch, key_row, key_head, value_batch, value_row, value_head, list_length,
    PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):
    """dQ of one block of queries of one head."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, head = row_and_head(heads)
    group = head // (heads // groups)
    position = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    row = query_start + position
    q = rows_of(query + batch * query_batch + head * query_head, position, queries, query_row, width, BLOCK_WIDTH)
    upstream = rows_of(
        grad + (batch * queries * heads + head) * width, position, queries, heads * width, width, BLOCK_WIDTH
    )
    at = (batch * heads + head) * queries
    normaliser = tl.load(lse + at + position, mask=position < queries, other=float("inf"))
    shift = tl.load(delta + at + position, mask=position < queries, other=0.0)
    key += batch * key_batch + group * key_head
    value += batch * value_batch + group * value_head
    intervals += batch * keys * 4
    own = batch * tl.num_programs(0) + block
    partial, every = tl.load(counts + own * 2), tl.load(counts + own * 2 + 1)
    others += own * list_length
    total = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), tl.float32)
    total = query_gradient_blocks(
        total, q, upstream, normaliser, shift, key, value, intervals, row, others, partial, every, keys,
        key_row, value_row, width, factor, False, PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
    )
    total = query_gradient_blocks(
        total, q, upstream, normaliser, shift, key, value, intervals, row, others, 0, partial, keys,
        key_row, value_row, width, factor, True, PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
    )
    lane = tl.arange(0, BLOCK_WIDTH)
    place = ((batch * queries + position.to(tl.int64)) * heads + head)[:, None] * width + lane[None, :]
    mask = (position < queries)[:, None] & (lane < width)[None, :]
    tl.store(grad_query + place, (total * scale).to(grad_query.dtype.element_ty), mask=mask)
