"""Losses of the visual codec that need no pretrained network, and its adversary.

README.md of `visual/` derives the entropy term. All functions return 0-d tensors that are means, so that weights do not
depend on batch or picture size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from ernie5.tokenizers.visual.quantizer import ScaleCodes
from ernie5.tokenizers.visual.scales import resize_to

PYRAMID_LEVELS = 3
LOG_FLOOR = 1e-3
BIT_SHARPNESS = 2.0
"""Logit of a bit per unit of its residual in units of 1/sqrt(d): a residual at a code point has p = 0.88."""


def laplacian_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the bands of a Laplacian pyramid of [N, 3, H, W] pictures (edges at three sizes).

    Perceptual in style: an edge that is blurred or displaced costs at every band, a smooth shade error at none.
    """
    difference = output - target
    total = difference.new_zeros(())
    for _ in range(PYRAMID_LEVELS):
        coarse = functional.avg_pool2d(difference, 2, ceil_mode=True)
        fine = functional.interpolate(coarse, size=difference.shape[-2:], mode="bilinear", align_corners=False)
        total = total + (difference - fine).abs().mean()
        difference = coarse
    return total / PYRAMID_LEVELS


def log_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the N pictures of ln(squared error + 1e-3) of [N, 3, H, W]: minus their mean PSNR, but for a factor.

    The floor is 36 dB: above it a picture is good enough to let the others have their way.
    """
    return ((output - target).square().flatten(1).mean(1) + LOG_FLOOR).log().mean()


def commitment_loss(latents: torch.Tensor, codes: ScaleCodes) -> torch.Tensor:
    """Squared distance of latents [B, d, h, w] to their finished codes, in units of a code's squared size 1/d."""
    return (latents - codes.finished.movedim(-1, 1)).square().mean() * latents.shape[1]


def entropy_loss(
    latents: torch.Tensor, codes: ScaleCodes, *, schedule: Sequence[tuple[int, int]], active_bits: int
) -> torch.Tensor:
    """Mean entropy of each bit minus the entropy of its mean over the batch, nats per bit, averaged over scales.

    The first term makes bits sure, the second makes every channel use both values (factorised over channels, the
    bit-wise form of the entropy penalty of lookup-free quantisation). Gradients reach latents [B, d, h, w] only.
    """
    total = latents.new_zeros(())
    for grid, residual in zip(schedule, codes.residuals, strict=True):
        resized = resize_to(latents, grid).movedim(1, -1)
        live = residual + resized - resized.detach()
        logits = BIT_SHARPNESS * latents.shape[1] ** 0.5 * live[..., :active_bits]
        mean = torch.sigmoid(logits).flatten(0, -2).mean(0)
        total = total + _entropy_of_logits(logits).mean() - _entropy(mean).mean()
    return total / len(schedule)


def _entropy_of_logits(logits: torch.Tensor) -> torch.Tensor:
    return functional.softplus(logits) - logits * torch.sigmoid(logits)


def _entropy(p: torch.Tensor) -> torch.Tensor:
    p = p.clamp(1e-6, 1.0 - 1e-6)
    return -(p * p.log() + (1.0 - p) * (1.0 - p).log())


class PatchDiscriminator(nn.Module):
    """Judges patches of 22 px, 8 px apart: [N, 3, H, W] -> one score per patch [N, 1, H/8, W/8]."""

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        widths = (3, channels, 2 * channels, 3 * channels)
        layers: list[nn.Module] = []
        for k in range(3):
            layers += [nn.Conv2d(widths[k], widths[k + 1], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Higher means more real; not bounded."""
        return self.layers(pictures)


def hinge_discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of a discriminator on its scores of real and reconstructed pictures (any shapes)."""
    return 0.5 * (functional.relu(1.0 - real).mean() + functional.relu(1.0 + fake).mean())


def hinge_generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """The codec's share: minus the mean score of its reconstructions."""
    return -fake.mean()


def psnr(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each sample of [N, ...] with values in [-1, 1] (peak-to-peak 2) -> [N]."""
    error = (output.float() - target.float()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(4.0 / error.clamp_min(1e-10))
