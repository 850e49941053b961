"""Casts to fp8 e4m3 with one fp32 scale per 1 x 128 (rows) or 128 x 128 (weights), as in DeepSeek-V3 (2412.19437)."""

from __future__ import annotations

import dataclasses

import torch

from ..checks import fp8_runs_on, require, require_fractions
from ..dispatch import choose_backend
from .reference import SIDE, cast_reference, widen_reference

OFFERED = ("triton", "torch", "reference")


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """values [..., R, C] e4m3 and scales [..., ceil(R / block_rows), ceil(C / 128)] fp32: x = values * scale."""

    values: torch.Tensor
    scales: torch.Tensor
    block_rows: int

    def widened(self) -> torch.Tensor:
        """The numbers that stand for x, in fp32."""
        return widen_reference(self.values, scales=self.scales, block_rows=self.block_rows)


def quant_cast(x: torch.Tensor, *, block_rows: int, transposed: bool = False, backend: str = "auto") -> ScaledTensor:
    """Cast x [R, C] or [E, R, C] with scales over block_rows x 128 of the last two dims; no gradient.

    block_rows: 1 for activations, 128 for weights. transposed: the result is that of the last two dims exchanged, made
    in the same pass (weights for the backward product). Raises KernelError for a backend that cannot run, ValueError
    for shapes.
    """
    rule = "it must be [rows, width] or [matrices, rows, width] with a width of at least 1"
    require(x.ndim in (2, 3) and x.shape[-1] > 0, op="quant_cast", name="x", tensor=x, rule=rule)
    require_fractions(x, op="quant_cast", name="x")
    if block_rows not in (1, SIDE):
        raise ValueError(f"quant_cast: block_rows is {block_rows}; scales cover 1 or {SIDE} rows")
    if transposed and block_rows == 1:
        raise ValueError("quant_cast: scales of 1 x 128 have no transpose; cast x.T itself")
    offered = OFFERED if fp8_runs_on(x.device) else OFFERED[1:]
    chosen = choose_backend(backend, op="quant_cast", offered=offered, device=x.device, dtype=x.dtype)
    if chosen == "triton":
        from .kernel import quant_cast_triton

        return ScaledTensor(*quant_cast_triton(x.detach(), block_rows, transposed), block_rows)
    return ScaledTensor(*cast_reference(x.detach().mT if transposed else x.detach(), block_rows=block_rows), block_rows)
