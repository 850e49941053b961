"""Grouped products in bf16 and fp8 and the linear head with its cross-entropy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from contest import Case, Contest, normal, with_gradients, without_gradients
from torch.nn import functional

from ernie5_kernels.grouped_gemm.kernel import multiply_outer, multiply_rows
from ernie5_kernels.grouped_gemm.scaled import multiply_scaled
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy
from ernie5_kernels.quant_cast import quant_cast

ROUNDED = 2e-2  # results keep 8 bits, and sums are taken in another order
FP8 = 6e-2  # e4m3 keeps 4 bits of either factor
CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Groups:
    """rows in `groups` of them times [cols, inner]; load: even, skewed (half to one, none to another) or random."""

    name: str
    rows: int
    groups: int
    inner: int
    cols: int
    load: str

    def counts(self) -> list[int]:
        """Rows of each group."""
        if self.load == "even":
            return [self.rows // self.groups] * self.groups
        if self.load == "skewed":
            shares = torch.tensor([0.0, *(2.0**-n for n in range(1, self.groups))])
        else:
            shares = torch.ones(self.groups)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.multinomial(shares, self.rows, replacement=True, generator=generator)
        return torch.bincount(drawn, minlength=self.groups).tolist()

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.cols


FLAGSHIP = (
    Groups("flagship, even load", 65532, 6, 8192, 7168, "even"),
    Groups("flagship, skewed load", 65532, 6, 8192, 7168, "skewed"),
    Groups("mean 256 rows", 16384, 64, 8192, 7168, "random"),
    Groups("mean 32 rows", 2048, 64, 8192, 7168, "random"),
    Groups("small, 64 experts", 65536, 64, 2048, 2048, "random"),
)
QUICK = (
    Groups("quick, even load", 8192, 8, 1024, 1024, "even"),
    Groups("quick, mean 32 rows", 512, 16, 1024, 1024, "random"),
)


def cases(*, quick: bool) -> Iterator[Case]:
    """Every shape, each of the three products, fp8, heads."""
    shapes = QUICK if quick else FLAGSHIP
    for shape in shapes:
        for part in ("forward", "dX", "dW"):
            yield Case("grouped_gemm", f"{part}, {shape.name}", functools.partial(grouped, shape, part=part))
    for shape in shapes:
        yield Case("grouped_gemm fp8", f"forward, {shape.name}", functools.partial(scaled, shape))
    heads = ((1024, 512, 4096),) if quick else ((8192, 2048, 65536), (8192, 8192, 200_000))
    for tokens, width, vocabulary in heads:
        for part in ("forward", "forward + backward"):
            name = f"{part}, {tokens} x {width} x {vocabulary}"
            yield Case("linear_cross_entropy", name, functools.partial(
                head, tokens=tokens, width=width, vocabulary=vocabulary, part=part))


def ends_of(counts: list[int], *, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Cumulative ends on the device."""
    return torch.tensor(counts).cumsum(0).to(dtype).cuda()


def grouped(shape: Groups, *, part: str) -> Contest:
    """One of the products; dense is one cuBLAS product of the same FLOPs, batched equal groups of them."""
    counts = shape.counts()
    ends, narrow_ends = ends_of(counts), ends_of(counts, dtype=torch.int32)
    x, y = normal(shape.rows, shape.inner), normal(shape.rows, shape.cols, seed=1)
    mean = shape.rows // shape.groups
    even = slice(0, mean * shape.groups)
    split = [t.split(counts) for t in (x, y)]
    batched = [t[even].view(shape.groups, mean, -1) for t in (x, y)]
    if part == "dW":
        return Contest(
            lambda: multiply_outer(y, right=x, offsets=ends),
            lambda: torch.stack([b.T @ a for a, b in zip(*split, strict=True)]), ROUNDED,
            {"grouped_mm": lambda: torch._grouped_mm(y.T, x, offs=narrow_ends),
             "dense": lambda: y.T @ x, "batched": lambda: torch.bmm(batched[1].mT, batched[0])}, flops=shape.flops,
        )
    weight = normal(shape.groups, shape.cols, shape.inner, scale=shape.inner**-0.5, seed=2)
    transposed = part == "dX"
    operand = y if transposed else x
    factors = weight if transposed else weight.mT
    return Contest(
        lambda: multiply_rows(operand, weight=weight, offsets=ends, transposed=transposed),
        lambda: torch.cat([a @ factors[g] for g, a in enumerate(split[transposed])]), ROUNDED,
        {"grouped_mm": lambda: torch._grouped_mm(operand, factors, offs=narrow_ends),
         "dense": lambda: operand @ factors[0], "batched": lambda: torch.bmm(batched[transposed], factors)},
        flops=shape.flops,
    )


def scaled(shape: Groups) -> Contest:
    """The product of operands that are e4m3 already, beside bf16 ones and cuBLAS in fp8 with one scale for all."""
    ends = ends_of(shape.counts())
    x = normal(shape.rows, shape.inner)
    weight = normal(shape.groups, shape.cols, shape.inner, scale=shape.inner**-0.5, seed=2)
    rows, weights = quant_cast(x, block_rows=1), quant_cast(weight, block_rows=128)
    one = torch.ones((), device="cuda")

    def dense() -> torch.Tensor:
        padded = rows.values[: shape.rows // 16 * 16]
        return torch._scaled_mm(padded, weights.values[0].T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    def exact() -> torch.Tensor:
        return multiply_rows(x, weight=weight, offsets=ends, transposed=False)

    return Contest(
        lambda: multiply_scaled(rows, weight=weights, offsets=ends, dtype=torch.bfloat16), exact, FP8,
        {"ours in bf16": exact, "dense fp8": dense}, flops=shape.flops,
    )


def head(*, tokens: int, width: int, vocabulary: int, part: str) -> Contest:
    """The loss; "chunked" is PyTorch 1,024 rows at a time with gradients made in the same pass, "whole" all logits."""
    hidden, weight = normal(tokens, width), normal(vocabulary, width, scale=width**-0.5, seed=1)
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).cuda()
    backward = part != "forward"
    run = with_gradients if backward else without_gradients

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, weight=w, targets=targets, backend="triton")

    def whole(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(functional.linear(h, w).float(), targets, reduction="sum")

    def by_rows(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        parts = zip(h.split(CHUNK), targets.split(CHUNK), strict=True)
        return sum(functional.cross_entropy((a @ w.T).float(), t, reduction="sum") for a, t in parts)

    def chunked(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, weight=w, targets=targets, backend="torch", chunk_rows=CHUNK)

    truth = run(chunked, hidden, weight) if backward else run(by_rows, hidden, weight)
    peers = {"chunked": truth}
    if tokens * vocabulary < 1 << 30:
        peers["whole"] = run(whole, hidden, weight)
    flops = 2.0 * tokens * width * vocabulary * (3 if backward else 1)
    return Contest(run(ours, hidden, weight), truth, ROUNDED, peers, flops=flops)
