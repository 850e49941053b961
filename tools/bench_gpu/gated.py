"""Experts' first product with SwiGLU in its epilogue beside the product and the activation one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from contest import Case, Contest, Run, normal, with_gradients, without_gradients
from products import FLAGSHIP, QUICK, ROUNDED, Groups, ends_of
from torch.nn import functional

from ernie5_kernels.grouped_gemm import grouped_gemm
from ernie5_kernels.grouped_swiglu import grouped_swiglu
from ernie5_kernels.swiglu import swiglu
from ernie5_kernels.token_rows import RowPlan, spread_rows

TOP_K = 4  # divides the rows of every shape


def cases(*, quick: bool) -> Iterator[Case]:
    """Every shape from rows and from tokens; both ways at the first."""
    shapes = QUICK if quick else FLAGSHIP
    for shape in shapes:
        for build, origin in ((from_rows, ""), (from_tokens, "from tokens, ")):
            yield Case("grouped_swiglu", f"forward, {origin}{shape.name}", functools.partial(build, shape))
    for build, origin in ((from_rows, ""), (from_tokens, "from tokens, ")):
        name = f"forward + backward, {origin}{shapes[0].name}"
        yield Case("grouped_swiglu", name, functools.partial(build, shapes[0], backward=True))


def _run(shape: Groups, *, backward: bool, x: torch.Tensor) -> Callable[[Callable[..., torch.Tensor]], Run]:
    """What makes a Run of a function of rows or tokens, the experts' weight and the rows' ones."""
    weight = normal(shape.groups, shape.cols, shape.inner, scale=shape.inner**-0.5, seed=2)
    scales = normal(shape.rows, dtype=torch.float32, seed=3)
    make = with_gradients if backward else without_gradients
    return lambda function: make(function, x, weight, scales)


def two_passes(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, *, ends: torch.Tensor) -> torch.Tensor:
    """The product is written, and read by the activation."""
    return swiglu(grouped_gemm(x, weight=weight, offsets=ends, backend="triton"), row_weights=scales, backend="triton")


def from_rows(shape: Groups, *, backward: bool = False) -> Contest:
    """Rows lie in the experts' order."""
    counts, ends = shape.counts(), ends_of(shape.counts())
    run = _run(shape, backward=backward, x=normal(shape.rows, shape.inner))

    def plain(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        parts = [a @ w.T for a, w in zip(x.split(counts), weight, strict=True)]
        gate, up = torch.cat(parts).chunk(2, -1)
        return functional.silu(gate) * up * scales[:, None].to(x.dtype)

    return Contest(
        run(lambda x, w, s: grouped_swiglu(x, gate_up=w, row_weights=s, offsets=ends, backend="triton")), run(plain),
        ROUNDED, {"two passes": run(functools.partial(two_passes, ends=ends))},
        flops=shape.flops * (3 if backward else 1),
    )


def from_tokens(shape: Groups, *, backward: bool = False) -> Contest:
    """Rows are copied from tokens first, or gathered by the product as it loads them."""
    ends, tokens = ends_of(shape.counts()), shape.rows // TOP_K
    order = torch.randperm(shape.rows, generator=torch.Generator().manual_seed(0))
    plan = RowPlan((order // TOP_K).cuda(), torch.argsort(order).view(tokens, TOP_K).cuda())
    run = _run(shape, backward=backward, x=normal(tokens, shape.inner))

    def fused(gathers: bool) -> Run:
        return run(lambda x, w, s: grouped_swiglu(
            x, gate_up=w, row_weights=s, offsets=ends, plan=plan, gathers=gathers, backend="triton"))

    apart = run(lambda x, w, s: two_passes(spread_rows(x, plan=plan, backend="triton"), w, s, ends=ends))
    return Contest(fused(False), apart, ROUNDED, {"gathered": fused(True), "two passes": apart},
                   flops=shape.flops * (3 if backward else 1))
