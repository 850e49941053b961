"""Multi-token prediction: module d predicts the token at t+d+2 through the shared head (SPEC section 1, MTP)."""

from __future__ import annotations

import torch

from ernie5.objectives.next_token import TextLoss
from ernie5.records import Batch, ModelOutput
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy


def mtp_loss(output: ModelOutput, *, batch: Batch, text_loss: TextLoss = linear_cross_entropy) -> torch.Tensor:
    """Sum over depths and their targets of -log p(id), in nats, 0-d fp32; 0 without MTP modules."""
    total = torch.zeros((), dtype=torch.float32, device=output.text_hidden.device)
    for hidden_ND, targets in zip(output.mtp_hidden, batch.mtp_targets, strict=True):
        total = total + text_loss(hidden_ND, weight=output.text_weight, targets=targets.ids)
    return total
