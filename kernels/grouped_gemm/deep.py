"""Grouped products in fp8 by DeepSeek's DeepGEMM (github.com/deepseek-ai/DeepGEMM, 2.1 and later), never run so far.

Its `m_grouped_fp8_gemm_nt_contiguous` takes e4m3 rows with a scale per 1 x 128 and weights with one per 128 x 128, as
`quant_cast` makes them, and writes bf16. Every group begins at a multiple of
`get_mk_alignment_for_contiguous_layout()` rows; an int32 per row names its group, -1 where there is none.
"""

from __future__ import annotations

import dataclasses

import torch

from ..checks import first_order, require
from ..quant_cast import ScaledTensor, quant_cast
from ..quant_cast.reference import SIDE
from .kernel import grouped_outer

CAPABILITY = (9, 0)
WIDTH_MULTIPLE = 16  # bytes of TMA, of which an e4m3 number is one


@dataclasses.dataclass(frozen=True)
class AlignedGroups:
    """Where R rows lie among P places at whose multiples of the alignment the groups begin.

    places [R] int64: the place of each row, 0 for rows past the last offset, which `used` [R] bool leaves out; sources
    [P] int64: the row of each place, any where none is; groups [P] int32: its group, -1 where no row is.
    """

    places: torch.Tensor
    used: torch.Tensor
    sources: torch.Tensor
    groups: torch.Tensor


def align_groups(offsets: torch.Tensor, *, rows: int, alignment: int) -> AlignedGroups:
    """Places for rows grouped by cumulative offsets [E]; P is the most that R rows in E groups can need, so that the
    host need not know how many they do."""
    count, device = offsets.shape[0], offsets.device
    most = (rows + count * (alignment - 1)) // alignment * alignment
    ends = offsets.long()
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    aligned_ends = (-(begins - ends).div(alignment, rounding_mode="floor") * alignment).cumsum(0)
    shifts = torch.cat([aligned_ends.new_zeros(1), aligned_ends[:-1]]) - begins

    row = torch.arange(rows, device=device)
    owner = torch.searchsorted(ends, row, right=True)
    used = owner < count
    places = torch.where(used, row + shifts[owner.clamp(max=count - 1)], 0)

    place = torch.arange(most, device=device)
    owner = torch.searchsorted(aligned_ends, place, right=True)
    nearest = owner.clamp(max=count - 1)
    source = place - shifts[nearest]
    filled = (owner < count) & (source < ends[nearest])
    sources = source.clamp(max=max(rows - 1, 0))
    return AlignedGroups(places, used, sources, torch.where(filled, owner, -1).int())


class DeepGroupedGemm(torch.autograd.Function):
    """y = x W^T and dx = dy W by DeepGEMM, dW = dy^T x in bf16 by Triton, as `ScaledGroupedGemm` does."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        return _multiply(rows, weight=quant_cast(weight, block_rows=SIDE), offsets=offsets)

    @staticmethod
    @first_order
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, offsets = ctx.saved_tensors
        grad, grad_rows = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            turned = quant_cast(weight, block_rows=SIDE, transposed=True)
            grad_rows = _multiply(grad, weight=turned, offsets=offsets)
        return grad_rows, grouped_outer(grad, rows, offsets) if ctx.needs_input_grad[1] else None, None


def _multiply(rows: torch.Tensor, *, weight: ScaledTensor, offsets: torch.Tensor) -> torch.Tensor:
    """rows [R, K] times e4m3 weight [E, M, K] -> [R, M] bf16; zeros past the last offset, whose rows it never uses."""
    import deep_gemm

    width = weight.values.shape[1]
    if not rows.shape[0]:
        return rows.new_zeros(0, width)
    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    aligned = align_groups(offsets, rows=rows.shape[0], alignment=alignment)
    narrow = quant_cast(rows, block_rows=1)
    values = narrow.values.view(torch.uint8).index_select(0, aligned.sources).view(narrow.values.dtype)
    scales = narrow.scales.index_select(0, aligned.sources)
    out = rows.new_empty(values.shape[0], width)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous((values, scales), (weight.values, weight.scales), out, aligned.groups)
    return out.index_select(0, aligned.places).masked_fill_(~aligned.used.unsqueeze(1), 0.0)


def require_deepgemm(rows: torch.Tensor, *, weight: torch.Tensor, op: str) -> None:
    """Ask for what DeepGEMM takes: bf16, widths that TMA reads, and fp32 scales, which it wants on sm_90 alone."""
    rule = "deepgemm multiplies for bfloat16 alone; use triton"
    require(rows.dtype == torch.bfloat16, op=op, name="rows", tensor=rows, rule=rule)
    holds = all(width > 0 and width % WIDTH_MULTIPLE == 0 for width in weight.shape[1:])
    rule = f"deepgemm takes widths that are multiples of {WIDTH_MULTIPLE}; use triton"
    require(holds, op=op, name="weight", tensor=weight, rule=rule)
    rule = "deepgemm needs compute capability 9.0 (from 10.0 on it wants scales that are powers of two); use triton"
    holds = rows.device.type != "cuda" or torch.cuda.get_device_capability(rows.device) == CAPABILITY
    require(holds, op=op, name="rows", tensor=rows, rule=rule)
