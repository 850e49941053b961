"""Attention under three masks, against flex_attention compiled and, where the mask is causal, PyTorch's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from contest import Case, Contest, Run, normal, with_gradients, without_gradients
from torch.nn import functional

from ernie5_kernels.attention import attention, dense_mask, plan_attention

ROUNDED = 3e-2  # weights, changes and results keep 8 bits each


@dataclasses.dataclass(frozen=True)
class Heads:
    """batch rows of tokens, query heads over key heads, each `width` wide."""

    batch: int
    tokens: int
    heads: int
    groups: int
    width: int


FLAGSHIP, SMALL, QUICK = Heads(1, 8192, 64, 8, 128), Heads(4, 2048, 16, 4, 64), Heads(1, 1024, 4, 2, 64)
MASKS = ("causal", "packed documents", "documents with bidirectional blocks")


def cases(*, quick: bool) -> Iterator[Case]:
    """Every mask at the flagship's heads, the causal one at small ones too; forward and both ways."""
    pairs = [(QUICK, mask) for mask in MASKS] if quick else [*((FLAGSHIP, m) for m in MASKS), (SMALL, MASKS[0])]
    for heads, mask in pairs:
        for backward in (False, True):
            sizes = f"{heads.batch} x {heads.tokens}, heads {heads.heads}/{heads.groups} of {heads.width}"
            name = f"{'forward + backward' if backward else 'forward'}, {mask}, {sizes}"
            yield Case("attention", name, functools.partial(contest, heads, mask=mask, backward=backward))


def intervals_of(heads: Heads, *, mask: str) -> torch.Tensor:
    """[B, T, 4]: one document; documents of 1,024 tokens in the mean; the same with pictures of 256 tokens."""
    tokens, columns, start = heads.tokens, [], 0
    lengths = torch.randint(64, 1984, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for length in [tokens] if mask == "causal" else lengths:
        end = min(tokens, start + length)
        for j in range(start, end):
            block = (j - start) // 512 * 512 + start  # the first 256 of each 512 tokens are a picture
            bidirectional = mask == MASKS[2] and j < block + 256
            columns.append((block if bidirectional else j, 0, 0, end))
        start = end
    return torch.tensor(columns[:tokens], dtype=torch.int32).expand(heads.batch, -1, -1).contiguous().cuda()


def visible_pairs(intervals: torch.Tensor) -> torch.Tensor:
    """How many pairs of query and key are visible, over the batch."""
    return sum(dense_mask(row[None], query_start=0, query_tokens=row.shape[0]).sum() for row in intervals)


def contest(heads: Heads, *, mask: str, backward: bool) -> Contest:
    """FLOPs of the visible pairs alone: 4 per pair and lane forward, 10 more backward (five products)."""
    intervals = intervals_of(heads, mask=mask)
    plan = plan_attention(
        intervals, batch_rows=heads.batch, query_tokens=heads.tokens, key_tokens=heads.tokens
    )
    shape = (heads.batch, heads.tokens)
    inputs = (normal(*shape, heads.heads, heads.width), normal(*shape, heads.groups, heads.width, seed=1),
              normal(*shape, heads.groups, heads.width, seed=2))
    run = with_gradients if backward else without_gradients

    def by(backend: str) -> Run:
        return run(lambda q, k, v: attention(q, key=k, value=v, plan=plan, backend=backend), *inputs)

    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True).transpose(1, 2)

    peers = {"flex": by("flex")}
    if mask == "causal":
        peers["sdpa"] = run(whole, *inputs)
    pairs = float(visible_pairs(intervals)) * heads.heads * heads.width
    return Contest(by("triton"), by("torch"), ROUNDED, peers, flops=(14.0 if backward else 4.0) * pairs)
