"""Grouped matrix product over contiguous segments, on CPU, with zeros where a group has no rows.

In fp32 a loop of products into one preallocated output is as fast as `torch._grouped_mm`, whose unaligned shapes and
rows past the end are undefined. In bf16 on CPU the library prepares a kernel for every new number of rows, which costs
more than the product; there the groups are padded to one multiple of ROUND_ROWS and multiplied as one batch (README).
"""

from __future__ import annotations

import dataclasses

import torch

from ..checks import first_order, kept_for_product

ROUND_ROWS = 64
LARGEST_WASTE = 4


class SegmentedGemm(torch.autograd.Function):
    """y_g = x_g W_g^T, dx_g = dy_g W_g, dW_g = dy_g^T x_g; an empty group gets dW_g = 0, never nothing."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.ends = offsets.tolist()
        ctx.slots = _slots(rows, ends=ctx.ends)
        ctx.save_for_backward(*kept_for_product(ctx, rows, weight))
        if ctx.slots is not None:
            return ctx.slots.take(torch.bmm(ctx.slots.spread(rows), weight.transpose(1, 2)))
        return _multiply(rows, weight=weight.transpose(1, 2), ends=ctx.ends)

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad, slots = grad.contiguous(), ctx.slots
        if slots is not None:
            spread = slots.spread(grad)
            return (
                slots.take(torch.bmm(spread, weight)) if ctx.needs_input_grad[0] else None,
                torch.bmm(spread.transpose(1, 2), slots.spread(rows)) if ctx.needs_input_grad[1] else None,
                None,
            )
        grad_rows = _multiply(grad, weight=weight, ends=ctx.ends) if ctx.needs_input_grad[0] else None
        grad_weight = _outer(grad, rows=rows, ends=ctx.ends) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None


@dataclasses.dataclass(frozen=True)
class PaddedSlots:
    """Slot index [R] of every row in a grid of groups x height rows; rows past the last group have none."""

    index: torch.Tensor
    groups: int
    height: int
    num_rows: int

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [R, K] -> [groups, height, K], zero where no row is."""
        grid = rows.new_zeros(self.groups * self.height, rows.shape[1])
        grid.index_copy_(0, self.index, rows[: self.index.numel()])
        return grid.view(self.groups, self.height, -1)

    def take(self, grid: torch.Tensor) -> torch.Tensor:
        """[groups, height, M] -> [R, M], zero past the last group."""
        taken = grid.flatten(0, 1).index_select(0, self.index)
        missing = self.num_rows - self.index.numel()
        return torch.nn.functional.pad(taken, (0, 0, 0, missing)) if missing else taken


def _slots(rows: torch.Tensor, *, ends: list[int]) -> PaddedSlots | None:
    """Where padding pays: narrow types on CPU, unless one group is so large that the grid would be mostly empty."""
    if rows.device.type != "cpu" or rows.dtype not in (torch.bfloat16, torch.float16) or ends[-1] == 0:
        return None
    places = torch.tensor(ends, device="cpu")
    counts = places.diff(prepend=places.new_zeros(1))
    height = -(-int(counts.max()) // ROUND_ROWS) * ROUND_ROWS
    if len(ends) * height > LARGEST_WASTE * ends[-1] + len(ends) * ROUND_ROWS:
        return None
    groups = torch.arange(len(ends), device="cpu")
    shift = groups * height - (places - counts)
    index = torch.arange(ends[-1], device="cpu") + shift.repeat_interleave(counts)
    return PaddedSlots(index, len(ends), height, rows.shape[0])


def _multiply(rows: torch.Tensor, *, weight: torch.Tensor, ends: list[int]) -> torch.Tensor:
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    start = 0
    for group, end in enumerate(ends):
        if end > start:
            torch.mm(rows[start:end], weight[group], out=out[start:end])
        start = end
    out[start:].zero_()
    return out


def _outer(grad: torch.Tensor, *, rows: torch.Tensor, ends: list[int]) -> torch.Tensor:
    out = rows.new_empty(len(ends), grad.shape[1], rows.shape[1])
    start = 0
    for group, end in enumerate(ends):
        if end > start:
            torch.mm(grad[start:end].T, rows[start:end], out=out[group])
        else:
            out[group].zero_()
        start = end
    return out
