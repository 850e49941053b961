"""Sums of gradients over ranks, in flat pieces: one collective for many tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ernie5.parallel.apply import Layout
from ernie5.parallel.collectives import all_reduce, sum_among
from ernie5.parallel.state import Axis

BUCKET_ELEMENTS = 50_000_000


def sum_gradients(parameters: dict[str, torch.nn.Parameter], *, layout: Layout) -> None:
    """Sum `parameters[...].grad` in place over the axes that the layout names, and over the pipeline stages that share
    a parameter; a missing gradient counts as zero.

    Buckets follow the order of names, which is the same on every rank of an axis. Parameters of which ranks hold parts
    of different sizes have buckets of their own: a ring adds up an element in an order that depends on its place, and
    the copies of a parameter must lie at the same place on the ranks that hold them, to stay equal bit for bit.
    """
    by_axes: dict[tuple[tuple[str, ...], bool], list[torch.Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        key = layout.shards[name].sum_axes, layout.is_uneven(name)
        by_axes.setdefault(key, []).append(parameter.grad)
    for (axes, _), gradients in by_axes.items():
        for axis in axes:
            sum_tensors(gradients, axis=layout.state.axis(axis))
    for name, parameter in parameters.items():
        stages = layout.shards[name].stages
        if len(stages) > 1:
            parameter.grad.copy_(sum_among(parameter.grad, axis=layout.state.pp, members=stages))


def sum_tensors(tensors: list[torch.Tensor], *, axis: Axis) -> None:
    """Sum each of `tensors` (of one dtype and device) over the ranks of `axis`, in place."""
    if axis.size == 1:
        return
    for bucket in _buckets(tensors):
        flat = all_reduce(torch.cat([tensor.flatten() for tensor in bucket]), axis=axis)
        for tensor, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(piece.view_as(tensor))


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
