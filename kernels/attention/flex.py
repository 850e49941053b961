"""Attention by PyTorch's flex_attention: compiled on a GPU, forward only and uncompiled on the CPU.

Blocks of 128 rows x 128 keys are hidden, partly or wholly visible; the table of them comes straight from the intervals
in O(T S / 128) memory, where PyTorch's own `create_block_mask` evaluates all T S pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ernie5.errors import KernelError

from .plan import AttentionPlan

BLOCK = 128


def attention_flex(
    query: torch.Tensor, *, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """query [B, T, H, C], key and value [B, S, G, C] -> [B, T, H, C]; a row that sees nothing gives zero.

    Raises KernelError where gradients are wanted on the CPU: PyTorch has no backward pass for it there.
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu:
        refuse_gradients_on_cpu(query, key, value)
    out = _flex(compiled=not on_cpu)(
        *(x.transpose(1, 2) for x in (query, key, value)),
        block_mask=plan.blocks, scale=scale, enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def refuse_gradients_on_cpu(*tensors: torch.Tensor) -> None:
    """Raise KernelError where a gradient of one of these tensors would be wanted."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise KernelError(
            "kernel attention: flex has no backward pass on the CPU (PyTorch's limit), so it cannot train there. Set "
            "model.attention_backend to auto, torch or sdpa"
        )


def block_mask(intervals: torch.Tensor, *, query_start: int, query_tokens: int) -> BlockMask:
    """The mask of rows query_start.. under intervals [B, S, 4], one for all heads."""
    visible_from, hidden_from, hidden_until, visible_until = (x.contiguous() for x in intervals.unbind(-1))

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        row = q + query_start
        hidden = (hidden_from[b, k] <= row) & (row < hidden_until[b, k])
        return (visible_from[b, k] <= row) & (row < visible_until[b, k]) & ~hidden

    some, whole = block_table(intervals, query_start=query_start, query_tokens=query_tokens)
    partly = some & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partly), *_listed(whole),
        BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(query_tokens, intervals.shape[1]),
    )


def block_table(
    intervals: torch.Tensor, *, query_start: int, query_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether any row of a block sees any key of another, and whether every row sees every key: two bool tensors
    [B, ceil(T / 128), ceil(S / 128)]. Rows and keys past the end count for neither.
    """
    first = torch.arange(0, query_tokens, BLOCK, device=intervals.device).add(query_start).view(1, -1, 1)
    last = (first + BLOCK).clamp(max=query_start + query_tokens)
    visible_from, hidden_from, hidden_until, visible_until = intervals.unsqueeze(1).unbind(-1)
    begin, end = torch.maximum(visible_from, first), torch.minimum(visible_until, last)
    some = (begin < end) & ~((hidden_from <= begin) & (end <= hidden_until))
    hides = (hidden_from < hidden_until) & (hidden_from < last) & (hidden_until > first)
    whole = (visible_from <= first) & (last <= visible_until) & ~hides
    missing = -intervals.shape[1] % BLOCK
    some = torch.nn.functional.pad(some, (0, missing), value=False).unflatten(-1, (-1, BLOCK)).any(-1)
    whole = torch.nn.functional.pad(whole, (0, missing), value=True).unflatten(-1, (-1, BLOCK)).all(-1)
    return some, whole


def _listed(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [B, 1, N] and indices [B, 1, N, M], chosen blocks first, of a table [B, N, M]."""
    order = torch.argsort(table.to(torch.int8), dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32).unsqueeze(1), order.to(torch.int32).unsqueeze(1)


@functools.cache
def _flex(*, compiled: bool) -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention) if compiled else flex_attention
