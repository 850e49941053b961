"""Expert order in Triton: a counting sort in two passes over the choices, then copies of whole rows.

The sort: blocks of slots count their experts, a prefix sum over blocks gives every block its first place in every
expert, and a slot's place is that plus the number of earlier slots of its block with the same expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import require
from ..launch import ceil_div, power_of_two

BLOCK_SLOTS = 128
COPY_WIDTH = 1024
WIDEST = 16384


@triton.jit
def count_kernel(choices, counts, slots, experts, BLOCK: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """counts[block, e] = slots of the block that chose e."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(choices + slot, mask=slot < slots, other=0).to(tl.int32)
    valid = (slot < slots) & (expert >= 0) & (expert < experts)
    bins = tl.histogram(expert, BLOCK_EXPERTS, mask=valid)
    index = tl.arange(0, BLOCK_EXPERTS)
    tl.store(counts + tl.program_id(0).to(tl.int64) * experts + index, bins, mask=index < experts)


@triton.jit
def place_kernel(choices, firsts, sources, places, slots, experts, top_k, BLOCK: tl.constexpr):
    """places[slot] = firsts[block, e] + earlier slots of the block with e; sources[place] = the slot's token."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(choices + slot, mask=slot < slots, other=-1).to(tl.int32)
    valid = (expert >= 0) & (expert < experts)
    index = tl.arange(0, BLOCK)
    earlier = (expert[:, None] == expert[None, :]) & (index[None, :] < index[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1).to(tl.int64)
    place = rank + tl.load(firsts + tl.program_id(0).to(tl.int64) * experts + expert, mask=valid, other=0)
    tl.store(places + slot, place, mask=valid)
    tl.store(sources + place, (slot // top_k).to(tl.int64), mask=valid)


@triton.jit
def permute_kernel(x, places, rows_out, width, TOP_K: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """rows_out[places[n, k]] = x[n] for one token and one stretch of columns: read once, written K times."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    value = tl.load(x + token * width + col, mask=col < width)
    for k in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + k)
        tl.store(rows_out + place * width + col, value, mask=col < width)


@triton.jit
def unpermute_kernel(
    rows, places, weights, out, width, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """out[n] = sum_k weights[n, k] rows[places[n, k]] for one token and one stretch of columns."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_WIDTH,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + k)
        value = tl.load(rows + place * width + col, mask=col < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP_K + k).to(tl.float32)
        total += value
    tl.store(out + token * width + col, total.to(out.dtype.element_ty), mask=col < width)


@triton.jit
def unpermute_backward_kernel(
    grad, rows, places, weights, grad_rows, grad_weights, width, TOP_K: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """One token, its gradient held in registers: d rows[place_k] = w_k dout, d w_k = dout . rows[place_k]."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_WIDTH)
    upstream = tl.load(grad + token * width + col, mask=col < width, other=0.0).to(tl.float32)
    for k in range(TOP_K):
        place = tl.load(places + token * TOP_K + k) * width + col
        weight = tl.load(weights + token * TOP_K + k).to(tl.float32)
        value = tl.load(rows + place, mask=col < width, other=0.0).to(tl.float32)
        tl.store(grad_rows + place, (upstream * weight).to(grad_rows.dtype.element_ty), mask=col < width)
        change = tl.sum(upstream * value)
        tl.store(grad_weights + token * TOP_K + k, change.to(grad_weights.dtype.element_ty))


@torch.library.custom_op("ernie5::plan_permutation", mutates_args=())
def plan_triton(choices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(offsets [E], sources [N*K], places [N, K]), all int64, of choices [N, K]."""
    choices = choices.contiguous()
    slots, top_k = choices.numel(), choices.shape[1]
    offsets, sources, places = _plan_results(choices, num_experts=num_experts)
    if not slots:
        return offsets.zero_(), sources, places
    blocks = ceil_div(slots, BLOCK_SLOTS)
    counts = torch.empty((blocks, num_experts), dtype=torch.int32, device=choices.device)
    experts = power_of_two(num_experts, least=16)
    count_kernel[(blocks,)](choices, counts, slots, num_experts, BLOCK_SLOTS, experts, num_warps=4)
    ends = counts.cumsum(0, dtype=torch.int64)
    torch.cumsum(ends[-1], 0, out=offsets)
    firsts = ends - counts + (offsets - ends[-1])
    place_kernel[(blocks,)](choices, firsts, sources, places, slots, num_experts, top_k, BLOCK_SLOTS, num_warps=4)
    return offsets, sources, places


def _plan_results(choices: torch.Tensor, *, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return choices.new_empty(num_experts), choices.new_empty(choices.shape[0] * choices.shape[1]), choices.new_empty(
        choices.shape
    )


@torch.library.custom_op("ernie5::permute", mutates_args=())
def permute_triton(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rows [N*K, D] with row places[n, k] = x[n]."""
    x, places, (tokens, top_k), width = x.contiguous(), places.contiguous(), places.shape, x.shape[1]
    out = x.new_empty(tokens * top_k, width)
    if out.numel():
        block = min(COPY_WIDTH, power_of_two(width, least=16))
        permute_kernel[(tokens, ceil_div(width, block))](x, places, out, width, top_k, block, num_warps=4)
    return out


@torch.library.custom_op("ernie5::unpermute", mutates_args=())
def unpermute_triton(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Weighted sum of each token's rows."""
    rows, places, (tokens, top_k), width = rows.contiguous(), places.contiguous(), places.shape, rows.shape[1]
    out = rows.new_empty(tokens, width)
    if out.numel():
        block = min(COPY_WIDTH, power_of_two(width, least=16))
        unpermute_kernel[(tokens, ceil_div(width, block))](
            rows, places, rows if weights is None else weights.contiguous(), out, width, top_k, weights is not None,
            block, num_warps=4,
        )
    return out


@torch.library.custom_op("ernie5::unpermute_backward", mutates_args=())
def unpermute_backward(
    grad: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and weights."""
    width = rows.shape[1]
    rule = f"the last dimension may be at most {WIDEST} wide, a row is held in registers; use backend reference"
    require(width <= WIDEST, op="moe_permute", name="rows", tensor=rows, rule=rule)
    grad_rows, grad_weights = rows.new_empty(rows.shape), weights.new_empty(weights.shape)
    if places.numel():
        block = power_of_two(width, least=16)
        unpermute_backward_kernel[(places.shape[0],)](
            grad.contiguous(), rows.contiguous(), places.contiguous(), weights.contiguous(), grad_rows, grad_weights,
            width, places.shape[1], block, num_warps=4 if block <= 4096 else 8,
        )
    return grad_rows, grad_weights


@plan_triton.register_fake
def _fake_plan(choices: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _plan_results(choices, num_experts=num_experts)


@permute_triton.register_fake
def _fake_permute(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return x.new_empty(places.shape[0] * places.shape[1], x.shape[1])


@unpermute_triton.register_fake
def _fake_unpermute(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1])


@unpermute_backward.register_fake
def _fake_unpermute_backward(
    grad: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save_permute(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _permute_gradient(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return unpermute_triton(grad, ctx.saved_tensors[0], None), None


def _save_unpermute(ctx, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], output: torch.Tensor) -> None:
    rows, places, weights = inputs
    ctx.weighted = weights is not None
    ctx.save_for_backward(*((rows, places, weights) if ctx.weighted else (places,)))


def _unpermute_gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if ctx.weighted:
        rows, places, weights = ctx.saved_tensors
        grad_rows, grad_weights = unpermute_backward(grad, rows, places, weights)
        return grad_rows, None, grad_weights
    return permute_triton(grad, ctx.saved_tensors[0]), None, None


permute_triton.register_autograd(_permute_gradient, setup_context=_save_permute)
unpermute_triton.register_autograd(_unpermute_gradients, setup_context=_save_unpermute)
