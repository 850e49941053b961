"""Classifier-free guidance over rows: the second half of the rows are the same items without their condition."""

from __future__ import annotations

import dataclasses

import torch

from ernie5.generate.sampling import guide


@dataclasses.dataclass(frozen=True)
class Guidance:
    """num_items items; with `is_doubled` rows num_items .. 2 * num_items - 1 hold the unconditional twins."""

    num_items: int
    scale: float = 1.0

    @property
    def is_doubled(self) -> bool:
        """A scale of 1 needs no second row."""
        return self.scale != 1.0

    def combine(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of all rows [rows, ..] -> guided logits [num_items, ..] fp32."""
        logits = logits.float()
        if not self.is_doubled:
            return logits
        conditional, unconditional = logits.split(self.num_items)
        return guide(conditional, unconditional=unconditional, scale=self.scale)

    def spread(self, chosen: torch.Tensor) -> torch.Tensor:
        """What was chosen per item [num_items, ..] -> per row [rows, ..]: both twins go on with the same choice."""
        return torch.cat([chosen, chosen]) if self.is_doubled else chosen
