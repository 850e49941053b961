"""Which positions of a row each context-parallel rank holds.

A row is cut into rounds of 2R chunks; of each round rank r holds chunks r and 2R-1-r. Under a causal mask over the
whole row one round is balanced already. Packed documents are short beside a long row: with few chunks per rank, who has
many visible pairs is a matter of luck, and several rounds even it out (measured in the README).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # configurations are checked with these sizes, without torch
    import torch

MOST_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """Which positions of a row each of `ranks` ranks holds: two chunks of `chunk` positions in each of `rounds`, and a
    sink each or not.

    Positions past the row's end fill the last chunks up; sinks have the positions after those.
    """

    ranks: int
    chunk: int
    has_sinks: bool
    rounds: int = 1

    @property
    def chunks(self) -> int:
        """Chunks of a row, of all ranks."""
        return 2 * self.ranks * self.rounds

    @property
    def local_tokens(self) -> int:
        """Positions per rank."""
        return 2 * self.rounds * self.chunk + self.has_sinks

    @property
    def all_tokens(self) -> int:
        """Positions over all ranks, fillers and sinks included."""
        return self.ranks * self.local_tokens

    def own_chunks(self, rank: int) -> tuple[int, ...]:
        """Numbers of the chunks of `rank`, in its local order, which is that of the row."""
        starts = range(0, self.chunks, 2 * self.ranks)
        return tuple(start + place for start in starts for place in (rank, 2 * self.ranks - 1 - rank))

    def pieces(self, rank: int) -> tuple[tuple[int, int], ...]:
        """(first position, positions) of each contiguous run of `rank`, in its local order."""
        runs = tuple((number * self.chunk, self.chunk) for number in self.own_chunks(rank))
        return (*runs, (self.chunks * self.chunk + rank, 1)) if self.has_sinks else runs

    def order(self, rank: int) -> torch.Tensor:
        """Positions [local_tokens] int64 of `rank`, in its local order."""
        import torch

        return torch.cat([torch.arange(first, first + size) for first, size in self.pieces(rank)])

    def owners(self) -> torch.Tensor:
        """The rank of each position [chunks * chunk] int64, sinks left out."""
        import torch

        ranks = torch.arange(self.ranks)
        return torch.cat([ranks, ranks.flip(0)]).repeat(self.rounds).repeat_interleave(self.chunk)


@dataclasses.dataclass(frozen=True)
class Splitter:
    """Splits rows over `ranks` ranks into as many rounds, up to MOST_ROUNDS, as leave chunks of `least` positions.

    is_one_length: parts have sinks whether they need them or not, so that equal rows have equal parts.
    """

    ranks: int
    least: int
    is_one_length: bool = False

    def of_row(self, tokens: int, *, has_sinks: bool) -> TokenSplit:
        """The split of a row of so many positions."""
        for rounds in range(1, MOST_ROUNDS + 1):  # the first that fits fills least up
            split = TokenSplit(self.ranks, -(-tokens // (2 * self.ranks * rounds)), has_sinks, rounds)
            if self._rounds(split.local_tokens) == rounds:
                return split
        raise AssertionError(f"no number of rounds fits a row of {tokens} positions")

    def of_part(self, local_tokens: int) -> TokenSplit:
        """The split that gives each rank `local_tokens` positions: an odd number has a sink."""
        rounds = self._rounds(local_tokens)
        return TokenSplit(self.ranks, local_tokens // (2 * rounds), local_tokens % 2 == 1, rounds)

    def _rounds(self, local_tokens: int) -> int:
        # of the part alone, which is all that a rank sees of a batch that was cut
        return min(MOST_ROUNDS, max(1, local_tokens // (2 * self.least)))
