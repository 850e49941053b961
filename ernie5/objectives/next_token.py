"""Next-token prediction on text positions (SPEC section 2, Text)."""

from __future__ import annotations

from typing import Protocol

import torch

from ernie5.records import Batch, ModelOutput
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy


class TextLoss(Protocol):
    """Cross-entropy of the text head; `parallel/` exchanges it where the head's rows are spread over ranks."""

    def __call__(self, hidden: torch.Tensor, *, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """hidden [N, D], weight (this process's rows of the head), targets [N] int64 -> sum of nats, 0-d."""


def next_token_loss(
    output: ModelOutput, *, batch: Batch, text_loss: TextLoss = linear_cross_entropy
) -> torch.Tensor:
    """Sum over text targets of -log p(id), in nats, 0-d fp32; whole logits [N, V] never exist."""
    return text_loss(output.text_hidden, weight=output.text_weight, targets=batch.text_targets.ids)
