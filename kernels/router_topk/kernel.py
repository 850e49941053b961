"""Routing in Triton: the logits are read once and leave as scores, choices, weights and counts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import ceil_div, power_of_two
from .reference import SMALLEST_SUM

TILE_ELEMENTS = 2048
WARPS = 4


@triton.jit
def router_topk_kernel(
    logits, bias, active, choices, weights, scores, counts, tokens, experts, scale, smallest,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RESTRICTED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):
    """BLOCK_TOKENS rows; K rounds of (largest, lowest index), and counts added once per program.

    A NaN compares equal to nothing: such a row chooses its last expert rather than leave the arrays.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    row_inside = token < tokens
    allowed = expert < experts
    if RESTRICTED:
        allowed &= tl.load(active + expert, mask=allowed, other=0) != 0
    inside = row_inside[:, None] & (expert < experts)[None, :]
    place = token[:, None] * experts + expert[None, :]
    value = tl.load(logits + place, mask=inside & allowed[None, :], other=float("-inf"))
    if SIGMOID:
        score = tl.sigmoid(value)
    else:
        peak = tl.max(value, axis=1)
        power = tl.exp(value - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
        mass = tl.sum(power, axis=1)
        score = power / tl.where(mass > 0.0, mass, 1.0)[:, None]
    tl.store(scores + place, score, mask=inside)
    preference = score + tl.load(bias + expert, mask=expert < experts, other=0.0)[None, :]
    preference = tl.where(allowed[None, :], preference, float("-inf"))
    free = inside
    total = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.where(free, preference, float("-inf")), axis=1)
        candidates = tl.where(free & (preference == best[:, None]), expert[None, :], BLOCK_EXPERTS)
        pick = tl.minimum(tl.min(candidates, axis=1), experts - 1)
        chosen = expert[None, :] == pick[:, None]
        free &= ~chosen
        own = tl.sum(tl.where(chosen, score, 0.0), axis=1)
        total += own
        tl.store(choices + token * TOP_K + k, pick.to(tl.int64), mask=row_inside)
        tl.store(weights + token * TOP_K + k, own, mask=row_inside)
    taken = tl.sum((inside & ~free).to(tl.int32), axis=0)
    tl.atomic_add(counts + expert, taken.to(tl.int64), mask=(expert < experts) & (taken > 0))
    factor = scale / tl.maximum(total, smallest)
    tl.debug_barrier()
    for k in tl.static_range(TOP_K):
        own = tl.load(weights + token * TOP_K + k, mask=row_inside, other=0.0)
        tl.store(weights + token * TOP_K + k, own * factor, mask=row_inside)


@triton.jit
def router_backward_kernel(
    scores, choices, grad_weights, grad_scores, grad_logits, tokens, experts, scale, smallest,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, SCORED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):
    """With S = sum of chosen scores: ds_k = scale (dw_k / S - sum_j dw_j s_j / S^2), then through the score."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    row_inside = token < tokens
    inside = row_inside[:, None] & (expert < experts)[None, :]
    place = token[:, None] * experts + expert[None, :]
    score = tl.load(scores + place, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_TOKENS,), tl.float32)
    product = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for k in tl.static_range(TOP_K):
        pick = tl.load(choices + token * TOP_K + k, mask=row_inside, other=0)
        own = tl.load(scores + token * experts + pick, mask=row_inside, other=0.0)
        total += own
        product += own * tl.load(grad_weights + token * TOP_K + k, mask=row_inside, other=0.0)
    bounded = tl.maximum(total, smallest)
    shift = tl.where(total > smallest, product / (bounded * bounded), 0.0)
    if SCORED:
        change = tl.load(grad_scores + place, mask=inside, other=0.0)
    else:
        change = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for k in tl.static_range(TOP_K):
        pick = tl.load(choices + token * TOP_K + k, mask=row_inside, other=0)
        upstream = tl.load(grad_weights + token * TOP_K + k, mask=row_inside, other=0.0)
        part = scale * (upstream / bounded - shift)
        change += tl.where(expert[None, :] == pick[:, None], part[:, None], 0.0)
    if SIGMOID:
        change *= score * (1.0 - score)
    else:
        change = score * (change - tl.sum(change * score, axis=1)[:, None])
    tl.store(grad_logits + place, change, mask=inside)


def blocks_of(experts: int) -> tuple[int, int]:
    """(tokens, experts) of a tile."""
    columns = power_of_two(experts, least=16)
    return max(1, TILE_ELEMENTS // columns), columns


@torch.library.custom_op("ernie5::router_topk", mutates_args=())
def router_topk_triton(
    logits: torch.Tensor, bias: torch.Tensor, active: torch.Tensor | None, top_k: int, uses_sigmoid: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, scores, choices int64, counts int64) of logits [N, E] fp32."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights, scores, choices, counts = _results(logits, top_k=top_k)
    counts.zero_()
    if tokens:
        block_tokens, block_experts = blocks_of(experts)
        router_topk_kernel[(ceil_div(tokens, block_tokens),)](
            logits, bias.contiguous(), bias if active is None else active.contiguous(), choices, weights, scores,
            counts, tokens, experts, scale, SMALLEST_SUM, top_k, uses_sigmoid, active is not None,
            block_tokens, block_experts, num_warps=WARPS,
        )
    return weights, scores, choices, counts


@torch.library.custom_op("ernie5::router_topk_backward", mutates_args=())
def router_backward(
    scores: torch.Tensor, choices: torch.Tensor, grad_weights: torch.Tensor | None, grad_scores: torch.Tensor | None,
    uses_sigmoid: bool, scale: float,
) -> torch.Tensor:
    """Gradient of the logits; either upstream gradient may be absent."""
    tokens, experts = scores.shape
    grad_logits = torch.empty_like(scores)
    if tokens:
        top_k = choices.shape[1]
        if grad_weights is None:
            grad_weights = scores.new_zeros(tokens, top_k)
        block_tokens, block_experts = blocks_of(experts)
        router_backward_kernel[(ceil_div(tokens, block_tokens),)](
            scores, choices, grad_weights.contiguous(), scores if grad_scores is None else grad_scores.contiguous(),
            grad_logits, tokens, experts, scale, SMALLEST_SUM, top_k, uses_sigmoid, grad_scores is not None,
            block_tokens, block_experts, num_warps=WARPS,
        )
    return grad_logits


def _results(logits: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, experts = logits.shape
    choices = logits.new_empty((tokens, top_k), dtype=torch.int64)
    counts = logits.new_empty((experts,), dtype=torch.int64)
    return logits.new_empty(tokens, top_k), logits.new_empty(tokens, experts), choices, counts


@router_topk_triton.register_fake
def _fake_forward(
    logits: torch.Tensor, bias: torch.Tensor, active: torch.Tensor | None, top_k: int, uses_sigmoid: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _results(logits, top_k=top_k)


@router_backward.register_fake
def _fake_backward(
    scores: torch.Tensor, choices: torch.Tensor, grad_weights: torch.Tensor | None, grad_scores: torch.Tensor | None,
    uses_sigmoid: bool, scale: float,
) -> torch.Tensor:
    return torch.empty_like(scores)


def _save(ctx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    _, scores, choices, counts = output
    ctx.save_for_backward(scores, choices)
    ctx.uses_sigmoid, ctx.scale = inputs[4:]
    ctx.mark_non_differentiable(choices, counts)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx, grad_weights: torch.Tensor | None, grad_scores: torch.Tensor | None, _: None, __: None
) -> tuple[torch.Tensor | None, ...]:
    scores, choices = ctx.saved_tensors
    grad = router_backward(scores, choices, grad_weights, grad_scores, ctx.uses_sigmoid, ctx.scale)
    return grad, None, None, None, None, None


router_topk_triton.register_autograd(_gradients, setup_context=_save)
