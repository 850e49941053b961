"""Keys and values of the tokens seen so far: the KeyValueCache of model/interfaces.py in growing buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FIRST_COLUMNS = 64


class GrowingCache:
    """One key and one value buffer [B, columns, G, C] per layer; a full buffer doubles, so that a token costs O(1)."""

    def __init__(self, num_layers: int) -> None:
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._lengths = [0] * num_layers

    def length(self, layer: int) -> int:
        """Tokens that layer `layer` holds."""
        return self._lengths[layer]

    def extend(self, layer: int, *, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value [B, T, G, C]; returns all of the layer's, [B, S, G, C], as views of the buffers."""
        start = self._lengths[layer]
        stop = start + key.shape[1]
        self._keys[layer] = _grown(self._keys[layer], like=key, used=start, needed=stop)
        self._values[layer] = _grown(self._values[layer], like=value, used=start, needed=stop)
        self._keys[layer][:, start:stop] = key
        self._values[layer][:, start:stop] = value
        self._lengths[layer] = stop
        return self._keys[layer][:, :stop], self._values[layer][:, :stop]

    def select(self, rows: Sequence[int]) -> None:
        """Keep `rows` in this order; a row may be named more than once (beam search)."""
        for buffers in (self._keys, self._values):
            for layer, buffer in enumerate(buffers):
                if buffer is not None:
                    buffers[layer] = buffer[list(rows)]


def _grown(buffer: torch.Tensor | None, *, like: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    if buffer is not None and buffer.shape[1] >= needed:
        return buffer
    columns = max(FIRST_COLUMNS, 2 * used, needed)
    grown = like.new_empty(like.shape[0], columns, *like.shape[2:])
    if buffer is not None:
        grown[:, :used] = buffer[:, :used]
    return grown
