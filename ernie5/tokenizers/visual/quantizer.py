"""Multi-scale residual bit-wise quantiser: latents [B, d, h, w] to d bits per cell and scale, and back.

Scale k quantises what scales < k left over, resized to its grid, to the signs of the d channels. A sign is worth
+-1/sqrt(d) (a point on the unit sphere; the vocabulary of 2^d points is never written down). With corruption, a copy of
the bits is flipped and only the copy is accumulated, so that later scales correct it: re-quantise and re-accumulate
(SPEC section 2). Data, training and generation all go through `accumulate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ernie5.tokenizers.visual.scales import resize_to


@dataclass(frozen=True)
class ScaleCodes:
    """Codes of one batch of frames.

    targets: one [B, h_k, w_k, d] fp32 in {0, 1} per scale, the uncorrupted bits; inputs: one [B, h_k, w_k, d] fp32 per
    scale, the (corrupted) sum of scales < k resized to grid k, zeros for k = 0; finished: [B, h, w, d] fp32, the
    (corrupted) sum of all scales; residuals: one [B, h_k, w_k, d] fp32 per scale, what was quantised.
    """

    targets: tuple[torch.Tensor, ...]
    inputs: tuple[torch.Tensor, ...]
    finished: torch.Tensor
    residuals: tuple[torch.Tensor, ...]


def quantize_bits(residual: torch.Tensor) -> torch.Tensor:
    """[..., d] of any float dtype -> bits in {0, 1}, same shape and dtype; zero counts as 1."""
    return (residual >= 0).to(residual.dtype)


def bits_to_values(bits: torch.Tensor) -> torch.Tensor:
    """[..., d] bits in {0, 1} -> +-1/sqrt(d), same shape and dtype."""
    return (2.0 * bits - 1.0) * bits.shape[-1] ** -0.5


def accumulate(accumulated: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Add one scale: accumulated [B, d, h, w] (finest grid) plus bits [B, h_k, w_k, d] resized to it."""
    values = bits_to_values(bits).movedim(-1, 1)
    return accumulated + resize_to(values, tuple(accumulated.shape[-2:]))


class MultiScaleQuantizer:
    """Encode latents scale by scale; stateless, exact in fp32."""

    def encode(
        self,
        latents: torch.Tensor,
        *,
        schedule: Sequence[tuple[int, int]],
        flip_probability: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        active_bits: int | None = None,
    ) -> ScaleCodes:
        """Quantise latents [B, d, h, w] fp32 over `schedule` (its last grid is h x w).

        flip_probability: None, or a tensor that broadcasts to [B, S], the chance of each bit of a scale to be flipped
        in what is accumulated; draws come from `generator`. active_bits: channels in use, the rest stay zero
        (progressive switching in training). Gradients do not flow; see `straight_through`.
        """
        latents = latents.detach().float()
        accumulated = torch.zeros_like(latents)
        mask = None
        if active_bits is not None and active_bits < latents.shape[1]:
            mask = (torch.arange(latents.shape[1], device=latents.device) < active_bits).float()[:, None, None]
            latents = latents * mask
        if flip_probability is not None:
            flip_probability = flip_probability.expand(latents.shape[0], len(schedule))
        targets, inputs, residuals = [], [], []
        for k, grid in enumerate(schedule):
            inputs.append(resize_to(accumulated, grid).movedim(1, -1))
            residual = resize_to(latents - accumulated, grid).movedim(1, -1)
            bits = quantize_bits(residual)
            targets.append(bits)
            residuals.append(residual)
            if flip_probability is not None:
                bits = flip_bits(bits, flip_probability[:, k], generator=generator)
            accumulated = accumulate(accumulated, bits)
            if mask is not None:
                accumulated = accumulated * mask
        return ScaleCodes(tuple(targets), tuple(inputs), accumulated.movedim(1, -1), tuple(residuals))

    def decode(self, bits: Sequence[torch.Tensor], *, grid: tuple[int, int]) -> torch.Tensor:
        """Sum the given scales' bits [B, h_k, w_k, d] (any number of leading scales) to latents [B, d, *grid]."""
        first = bits[0]
        accumulated = torch.zeros(first.shape[0], first.shape[-1], *grid, dtype=first.dtype, device=first.device)
        for scale_bits in bits:
            accumulated = accumulate(accumulated, scale_bits)
        return accumulated


def flip_bits(
    bits: torch.Tensor, probability: torch.Tensor, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Flip each bit of bits [B, ...] with probability [B]; returns a new tensor."""
    draw = torch.rand(bits.shape, generator=generator, device=bits.device)
    flip = draw < probability.to(bits.device).reshape(-1, *[1] * (bits.ndim - 1))
    return torch.where(flip, 1.0 - bits, bits)


def straight_through(latents: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
    """Codes [B, h, w, d] in the forward pass, the gradient of latents [B, d, h, w] in the backward pass."""
    return latents + (finished.movedim(-1, 1) - latents).detach()
