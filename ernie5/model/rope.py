"""Uni-RoPE: one rotary table over three position axes (SPEC section 1, channel split).

With n = C/2 frequencies base^(-i/n), the n_t slowest turn with t; the others alternate h (even i) and w (odd i), as in
ERNIE-4.5-VL. Where t = h = w this is plain 1-D RoPE. Pairs are interleaved: (0, 1), (2, 3), ...
"""

from __future__ import annotations

import torch

from ernie5_kernels.rope3d import rotation_of

T_AXIS, H_AXIS, W_AXIS = 0, 1, 2


def temporal_frequencies(frequencies: int) -> int:
    """n_t: the number nearest to 20 n / 64 that leaves an even rest, the larger of two (64->20, 16->6, 8->2)."""
    candidates = range(frequencies % 2, frequencies + 1, 2)
    return min(candidates, key=lambda n: (abs(64 * n - 20 * frequencies), -n))


def axes_of_frequencies(frequencies: int) -> list[int]:
    """Position axis that turns each frequency, fastest first."""
    spatial = frequencies - temporal_frequencies(frequencies)
    return [W_AXIS if i % 2 else H_AXIS for i in range(spatial)] + [T_AXIS] * (frequencies - spatial)


def rotary_angles(positions: torch.Tensor, *, head_width: int, base: float) -> torch.Tensor:
    """Angles [B, T, C/2] of positions [B, T, 3] (t, h, w), fractional allowed; same dtype, at least fp32."""
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    count = head_width // 2
    exponents = torch.arange(count, dtype=torch.float64, device=positions.device) / count
    inverse = torch.pow(torch.tensor(base, dtype=torch.float64, device=positions.device), -exponents)
    axes = torch.tensor(axes_of_frequencies(count), device=positions.device)
    return wide.index_select(-1, axes) * inverse.to(wide.dtype)


def rotation(positions: torch.Tensor, *, head_width: int, base: float) -> torch.Tensor:
    """Unit complex numbers [B, T, C/2] that `rope3d` multiplies queries and keys with; shared by every layer."""
    return rotation_of(rotary_angles(positions, head_width=head_width, base=base))
