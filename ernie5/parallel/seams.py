"""How a part of the model is exchanged for its parallel form."""

from __future__ import annotations

from typing import Protocol

import torch


class Install(Protocol):
    """Exchanges attributes and remembers the plain ones, so that the model can be whole again for a while."""

    def __call__(self, owner: torch.nn.Module, attribute: str, value: object, /) -> None:
        """Set `owner.attribute` to `value`."""
