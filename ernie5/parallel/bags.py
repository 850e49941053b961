"""Rows in bags: each row belongs to one item, and an item owns any number of rows, none included.

Spreading items over their rows and summing rows per item are adjoint, so neither pass needs a scattered addition, and
sums run in the order of rows at every repetition.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Bags:
    """owners [M] int64: the item of each row; members [M] int64: rows ordered by item; starts [N] int64: where each
    item's members begin."""

    owners: torch.Tensor
    members: torch.Tensor
    starts: torch.Tensor


def bag_rows(owners: torch.Tensor, *, items: int) -> Bags:
    """The bags of `items` items whose rows have `owners` [M] int64."""
    counts = torch.bincount(owners, minlength=items)
    return Bags(owners, torch.argsort(owners, stable=True), counts.cumsum(0) - counts)


def spread_bags(x: torch.Tensor, *, bags: Bags) -> torch.Tensor:
    """x [N, D] -> rows [M, D], each item copied to its rows; the gradient is summed per item."""
    return _Spread.apply(x, bags)


def sum_bags(rows: torch.Tensor, *, bags: Bags) -> torch.Tensor:
    """rows [M, D] -> [N, D], summed per item, zero for an item without rows; the gradient is spread."""
    return _Sum.apply(rows, bags)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bags):
        ctx.bags = bags
        return x.index_select(0, bags.owners)

    @staticmethod
    def backward(ctx, grad):
        return _sum(grad, bags=ctx.bags), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, bags):
        ctx.bags = bags
        return _sum(rows, bags=bags)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.bags.owners), None


def _sum(rows: torch.Tensor, *, bags: Bags) -> torch.Tensor:
    if rows.shape[0] == 0:
        return rows.new_zeros(bags.starts.shape[0], rows.shape[1])
    return torch.nn.functional.embedding_bag(bags.members, rows.contiguous(), bags.starts, mode="sum")
