"""Every CPU kernel beside the same in plain PyTorch: leaves, two functions of them, and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from shapes import HEAD_WIDTH, ROW_TOKENS, VOCABULARY, Shape
from torch.nn import functional

from ernie5_kernels.attention import attention, plan_attention
from ernie5_kernels.experts import experts
from ernie5_kernels.linear import linear
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy
from ernie5_kernels.rms_norm import rms_norm
from ernie5_kernels.swiglu import swiglu

Function = Callable[..., torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """flops and moved bytes (each input and output once) of forward and backward together."""

    name: str
    leaves: tuple[torch.Tensor, ...]
    ours: Function
    plain: Function
    flops: float
    moved_bytes: float


def build_cases(shape: Shape, *, dtype: torch.dtype) -> list[Case]:
    """The kernels of one layer and of the head at `shape`."""
    return [
        _linear(shape, dtype=dtype), _attention(shape, dtype=dtype), _experts(shape, dtype=dtype),
        _head(shape, dtype=dtype), _norm(shape, dtype=dtype), _swiglu(shape, dtype=dtype),
    ]


def _leaf(*sizes: int, dtype: torch.dtype, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(sizes) * std).to(dtype).requires_grad_()


def _case(name: str, leaves: tuple[torch.Tensor, ...], ours: Function, plain: Function, *, flops: float) -> Case:
    return Case(name, leaves, ours, plain, flops, 3.0 * sum(leaf.nbytes for leaf in leaves))


def _linear(shape: Shape, *, dtype: torch.dtype) -> Case:
    leaves = (_leaf(shape.tokens, shape.width, dtype=dtype), _leaf(shape.width, shape.width, dtype=dtype, std=0.05))
    flops = 6.0 * shape.tokens * shape.width**2
    return _case("linear", leaves, lambda x, w: linear(x, weight=w), functional.linear, flops=flops)


def _attention(shape: Shape, *, dtype: torch.dtype) -> Case:
    rows = shape.tokens // ROW_TOKENS
    sizes = [(rows, ROW_TOKENS, heads, HEAD_WIDTH) for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads)]
    intervals = torch.zeros(rows, ROW_TOKENS, 4, dtype=torch.int32)
    intervals[..., 0], intervals[..., 3] = torch.arange(ROW_TOKENS), ROW_TOKENS
    plan = plan_attention(intervals, batch_rows=rows, query_tokens=ROW_TOKENS, key_tokens=ROW_TOKENS)

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        turned = (x.transpose(1, 2) for x in (query, key, value))
        out = functional.scaled_dot_product_attention(*turned, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return _case(
        "attention, causal", tuple(_leaf(*size, dtype=dtype) for size in sizes),
        lambda q, k, v: attention(q, key=k, value=v, plan=plan), plain,
        flops=7.0 * 2 * shape.tokens * shape.query_heads * HEAD_WIDTH * (ROW_TOKENS + 1) / 2,
    )


def _experts(shape: Shape, *, dtype: torch.dtype) -> Case:
    rows = shape.tokens * shape.top_k
    counts = torch.bincount(torch.randint(0, shape.experts, (rows,)), minlength=shape.experts)
    offsets, weights = counts.cumsum(0), torch.ones(rows)
    ends = offsets.tolist()

    def plain(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        parts = []
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            gate, up = functional.linear(x[start:end], gate_up[expert]).chunk(2, -1)
            parts.append(functional.linear(functional.silu(gate) * up, down[expert]))
        return torch.cat(parts)

    leaves = (
        _leaf(rows, shape.width, dtype=dtype),
        _leaf(shape.experts, 2 * shape.expert_width, shape.width, dtype=dtype, std=shape.width**-0.5),
        _leaf(shape.experts, shape.width, shape.expert_width, dtype=dtype, std=shape.expert_width**-0.5),
    )
    return _case(
        "experts", leaves,
        lambda x, g, d: experts(x, row_weights=weights, gate_up=g, down=d, offsets=offsets), plain,
        flops=18.0 * rows * shape.width * shape.expert_width,
    )


def _head(shape: Shape, *, dtype: torch.dtype) -> Case:
    targets = torch.randint(0, VOCABULARY, (shape.tokens,))
    leaves = (_leaf(shape.tokens, shape.width, dtype=dtype), _leaf(VOCABULARY, shape.width, dtype=dtype, std=0.05))
    return _case(
        "linear cross-entropy", leaves, lambda x, w: linear_cross_entropy(x, weight=w, targets=targets),
        lambda x, w: functional.cross_entropy(functional.linear(x, w).float(), targets, reduction="sum"),
        flops=6.0 * shape.tokens * VOCABULARY * shape.width,
    )


def _norm(shape: Shape, *, dtype: torch.dtype) -> Case:
    leaves = (_leaf(shape.tokens, shape.width, dtype=dtype), _leaf(shape.width, dtype=dtype))
    return _case(
        "RMSNorm", leaves, lambda x, w: rms_norm(x, weight=w, eps=1e-5),
        lambda x, w: functional.rms_norm(x, w.shape, w, 1e-5), flops=0.0,
    )


def _swiglu(shape: Shape, *, dtype: torch.dtype) -> Case:
    leaves = (_leaf(shape.tokens * shape.top_k, 2 * shape.expert_width, dtype=dtype),)

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    return _case("SwiGLU", leaves, swiglu, plain, flops=0.0)
