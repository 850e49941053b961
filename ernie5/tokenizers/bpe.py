"""Byte-pair merging with BPE-dropout: the one encoder under every text vocabulary.

HF `tokenizers` trains merges and splits text, but its dropout draws from an unseeded generator; here each draw comes
from a generator that the caller seeds, so that a training stream can be repeated (Provilkov et al., arXiv:1910.13267:
at every step each applicable merge is dropped with probability p; the best of the others is applied).
"""

from __future__ import annotations

import dataclasses
import heapq
import random

from ernie5.errors import TokenizerError


@dataclasses.dataclass(frozen=True)
class MergeTable:
    """A byte-pair vocabulary.

    byte_ids: id of each of the 256 byte values; merges: (left id, right id) -> (rank, merged id), low ranks first;
    tokens: id -> bytes, in full; whole_first: a piece that is a token as it stands is never split (tiktoken's rule).
    """

    byte_ids: tuple[int, ...]
    merges: dict[tuple[int, int], tuple[int, int]]
    tokens: dict[int, bytes]
    whole_first: bool = False

    @property
    def size(self) -> int:
        """Number of ids: the largest id plus one."""
        return max(self.tokens) + 1


def build_table(
    byte_ids: tuple[int, ...], *, merges: list[tuple[int, int, int]], extra: dict[int, bytes], whole_first: bool
) -> MergeTable:
    """Table from (left, right, merged) triples in order of rank and `extra` tokens that no merge makes.

    Raises TokenizerError for a merge of ids that do not exist yet, or two byte strings under one id.
    """
    if len(byte_ids) != 256 or len(set(byte_ids)) != 256:
        raise TokenizerError("a byte-level vocabulary needs one id for each of the 256 byte values.")
    tokens = {token: bytes([value]) for value, token in enumerate(byte_ids)}
    for token, content in extra.items():
        if tokens.setdefault(token, content) != content:
            raise TokenizerError(f"id {token} has two meanings.")
    table: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, (left, right, merged) in enumerate(merges):
        if left not in tokens or right not in tokens:
            raise TokenizerError(f"merge {rank} joins ids {left} and {right}, of which one was not made before it.")
        content = tokens[left] + tokens[right]
        if tokens.setdefault(merged, content) != content:
            raise TokenizerError(f"merge {rank} gives id {merged} a second meaning.")
        table.setdefault((left, right), (rank, merged))
    return MergeTable(byte_ids, table, tokens, whole_first)


def merge_piece(
    piece: bytes, *, table: MergeTable, dropout: float = 0.0, draws: random.Random | None = None
) -> list[int]:
    """Ids of one piece of text. With dropout > 0 every merge draws from `draws`; O(n log n) for n bytes."""
    symbols = [table.byte_ids[value] for value in piece]
    if len(symbols) < 2:
        return symbols
    after = list(range(1, len(symbols))) + [-1]
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[int, int, int, int]] = []
    for place in range(len(symbols) - 1):
        _offer(queue, table, symbols, place, place + 1)
    heapq.heapify(queue)
    dropped: list[tuple[int, int, int, int]] = []
    while queue:
        best = heapq.heappop(queue)
        _, place, left, right = best
        other = after[place]
        if symbols[place] != left or other < 0 or symbols[other] != right:
            continue
        if dropout and draws is not None and draws.random() < dropout:
            dropped.append(best)
            continue
        symbols[place] = table.merges[(left, right)][1]
        symbols[other] = -1
        after[place] = after[other]
        if after[place] >= 0:
            before[after[place]] = place
            _push(queue, table, symbols, place, after[place])
        if before[place] >= 0:
            _push(queue, table, symbols, before[place], place)
        for item in dropped:
            heapq.heappush(queue, item)
        dropped.clear()
    return [symbol for symbol in symbols if symbol >= 0]


def _offer(queue: list, table: MergeTable, symbols: list[int], place: int, other: int) -> None:
    found = table.merges.get((symbols[place], symbols[other]))
    if found is not None:
        queue.append((found[0], place, symbols[place], symbols[other]))


def _push(queue: list, table: MergeTable, symbols: list[int], place: int, other: int) -> None:
    found = table.merges.get((symbols[place], symbols[other]))
    if found is not None:
        heapq.heappush(queue, (found[0], place, symbols[place], symbols[other]))
