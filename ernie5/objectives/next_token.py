"""Next-token prediction on text positions (SPEC section 2, Text)."""

from __future__ import annotations

import torch

from ernie5.records import Batch, ModelOutput
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy


def next_token_loss(output: ModelOutput, *, batch: Batch) -> torch.Tensor:
    """Sum over text targets of -log p(id), in nats, 0-d fp32; whole logits [N, V] never exist."""
    return linear_cross_entropy(output.text_hidden, weight=output.text_weight, targets=batch.text_targets.ids)
