"""Next-frame-and-scale prediction: d independent binary targets per cell (SPEC section 2, image and video)."""

from __future__ import annotations

import dataclasses

import torch

from ernie5.records import Batch, ModelOutput
from ernie5_kernels.bit_cross_entropy import bit_cross_entropy


@dataclasses.dataclass(frozen=True)
class BitLosses:
    """Weighted sums of nats over bits, 0-d fp32."""

    image: torch.Tensor
    video: torch.Tensor


def next_scale_loss(output: ModelOutput, *, batch: Batch) -> BitLosses:
    """Bit-wise cross-entropy, cells weighted by `bit_targets.weights` (mean 1 over one picture or clip).

    The weights make early scales count more without changing the divisor: over a whole picture the weighted sum has
    the magnitude of the plain one, so dividing by the number of bits still gives nats per bit.
    """
    targets = batch.bit_targets
    nats_N = bit_cross_entropy(output.bit_logits, bits=targets.bits, weights=targets.weights)
    video_N = targets.is_video.to(nats_N.dtype)
    return BitLosses(image=(nats_N * (1 - video_N)).sum(), video=(nats_N * video_N).sum())
