"""Scaled casts to fp8 in plain PyTorch."""

from __future__ import annotations

import torch

LARGEST = 448.0  # of e4m3 (OCP 8-bit floating point specification)
SMALLEST_PEAK = 1e-12
SIDE = 128


def cast_reference(x: torch.Tensor, *, block_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale as e4m3, scales) with scale = max|x| / 448 over blocks of block_rows x 128 of the last two dims."""
    *lead, rows, cols = x.shape
    tall, wide = -(-rows // block_rows), -(-cols // SIDE)
    padded = torch.nn.functional.pad(x.float(), (0, wide * SIDE - cols, 0, tall * block_rows - rows))
    blocks = padded.view(*lead, tall, block_rows, wide, SIDE)
    scales = blocks.abs().amax(dim=(-3, -1)).clamp_min(SMALLEST_PEAK) / LARGEST
    scaled = (blocks / scales[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)
    return scaled[..., :rows, :cols].contiguous().to(torch.float8_e4m3fn), scales


def widen_reference(values: torch.Tensor, *, scales: torch.Tensor, block_rows: int) -> torch.Tensor:
    """values times their block's scale, in fp32."""
    rows, cols = values.shape[-2:]
    spread = scales.repeat_interleave(block_rows, dim=-2).repeat_interleave(SIDE, dim=-1)
    return values.float() * spread[..., :rows, :cols]
