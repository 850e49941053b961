"""The nearest semi-orthogonal matrix by iterated products: what Muon does to a momentum, and most of what it costs.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from ernie5_kernels.processor import multiplies_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)

JOINED_NUMBERS = 2**24
"""Elements that stacks of small matrices are joined up to: 64 MiB of fp32 beside the momenta."""


def orthogonalise(matrix: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Nearest semi-orthogonal matrix to `matrix` [.., M, N], roughly: singular values land in about [0.7, 1.2].

    Quintic Newton-Schulz iteration X <- aX + (bA + cA^2) X with A = X X^T, in bf16 where the processor multiplies it
    natively (two and a half times as fast on AVX-512), else in fp32, and in fp64 for a matrix in fp64: the type of the
    result.
    """
    a, b, c = COEFFICIENTS
    work = matrix.flatten(0, -3) if matrix.dim() > 2 else matrix[None]
    tall = work.shape[-2] > work.shape[-1]
    work = (work.mT if tall else work).to(torch.promote_types(matrix.dtype, torch.float32))
    norm = torch.linalg.matrix_norm(work, keepdim=True) + 1e-7
    work = (work / norm).to(iteration_dtype(work))
    for _ in range(steps):
        gram = work @ work.mT
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        work = torch.baddbmm(work, inner, work, beta=a)
    return (work.mT if tall else work).reshape(matrix.shape)


def orthogonalise_all(stacks: Sequence[torch.Tensor], *, steps: int) -> list[torch.Tensor]:
    """`orthogonalise` of every stack [n, M, N]. On a GPU, where launches of small products cost more than the products,
    stacks of one shape are iterated together, as many as `JOINED_NUMBERS` allows."""
    if not stacks or stacks[0].device.type == "cpu":
        return [orthogonalise(stack, steps=steps) for stack in stacks]
    results: list[torch.Tensor | None] = [None] * len(stacks)
    for batch in join_stacks(stacks, limit=JOINED_NUMBERS):
        joined = orthogonalise(torch.cat([stacks[index] for index in batch]), steps=steps)
        for index, part in zip(batch, joined.split([len(stacks[index]) for index in batch]), strict=True):
            results[index] = part
    return results


def join_stacks(stacks: Sequence[torch.Tensor], *, limit: int) -> list[list[int]]:
    """Indices of stacks [n, M, N] that go together: equal matrices, at most `limit` elements unless one has more."""
    by_shape: dict[torch.Size, list[list[int]]] = {}
    for index, stack in enumerate(stacks):
        batches = by_shape.setdefault(stack.shape[-2:], [[]])
        if batches[-1] and sum(stacks[k].numel() for k in batches[-1]) + stack.numel() > limit:
            batches.append([])
        batches[-1].append(index)
    return [batch for batches in by_shape.values() for batch in batches]


def iteration_dtype(matrix: torch.Tensor) -> torch.dtype:
    """The type that a matrix of fp32 or fp64 is iterated in, as `orthogonalise` says."""
    if matrix.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if multiplies_bf16(matrix.device) else torch.float32
