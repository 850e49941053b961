"""Tokens to expert order and back in plain PyTorch."""

from __future__ import annotations

import torch


def plan_reference(choices: torch.Tensor, *, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(offsets [E], sources [N*K], places [N, K]) of a stable sort of choices [N, K] by expert."""
    flat = choices.flatten()
    order = flat.sort(stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    offsets = torch.bincount(flat, minlength=num_experts).cumsum(0)
    return offsets, order // choices.shape[1], places.view(choices.shape)


def permute_reference(x: torch.Tensor, *, sources: torch.Tensor) -> torch.Tensor:
    """rows[r] = x[sources[r]]."""
    return x[sources]


def unpermute_reference(rows: torch.Tensor, *, places: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """out[n] = sum_k weights[n, k] rows[places[n, k]], in at least fp32."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))[places]
    if weights is not None:
        wide = wide * weights.to(wide.dtype).unsqueeze(-1)
    return wide.sum(1).to(rows.dtype)
