"""Which positions of a row each context-parallel rank holds."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """Which positions of a row each of `ranks` ranks holds: chunks of `chunk` positions, and a sink each or not.

    Positions past the row's end fill the last chunks up; sinks have the positions after those.
    """

    ranks: int
    chunk: int
    has_sinks: bool

    @property
    def local_tokens(self) -> int:
        """Positions per rank."""
        return 2 * self.chunk + self.has_sinks

    @property
    def all_tokens(self) -> int:
        """Positions over all ranks, fillers and sinks included."""
        return self.ranks * self.local_tokens

    def pieces(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(first position, positions) of each contiguous run of `rank`, in its local order."""
        runs = ((rank * self.chunk, self.chunk), ((2 * self.ranks - 1 - rank) * self.chunk, self.chunk))
        return (*runs, (2 * self.ranks * self.chunk + rank, 1)) if self.has_sinks else runs

    def order(self, rank: int) -> torch.Tensor:
        """Positions [local_tokens] int64 of `rank`, in its local order."""
        return torch.cat([torch.arange(first, first + size) for first, size in self.pieces(rank)])


def split_of(local_tokens: int, *, ranks: int) -> TokenSplit:
    """The split that gives each rank `local_tokens` positions: an odd number has a sink."""
    return TokenSplit(ranks, local_tokens // 2, local_tokens % 2 == 1)
