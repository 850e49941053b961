"""Byte-pair merging with BPE-dropout: the one encoder under every text vocabulary.

HF `tokenizers` trains merges and splits text, but its dropout draws from an unseeded generator; here each draw comes
from a generator that the caller seeds, so that a training stream can be repeated (Provilkov et al., arXiv:1910.13267:
at every step each applicable merge is dropped with probability p; the best of the others is applied).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections.abc import Callable

from ernie5.errors import TokenizerError

LONG_PIECE = 128
NEVER = 1 << 62


@dataclasses.dataclass(frozen=True)
class MergeTable:
    """A byte-pair vocabulary.

    byte_ids: id of each of the 256 byte values; ranks: (left id, right id) -> rank, low ranks merge first; merged: the
    merged id of every rank; tokens: id -> bytes, in full; whole_first: a piece that is a token as it stands is never
    split (tiktoken's rule).
    """

    byte_ids: tuple[int, ...]
    ranks: dict[tuple[int, int], int]
    merged: list[int]
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
    ranks: dict[tuple[int, int], int] = {}
    for rank, (left, right, merged) in enumerate(merges):
        if left not in tokens or right not in tokens:
            raise TokenizerError(f"merge {rank} joins ids {left} and {right}, of which one was not made before it.")
        content = tokens[left] + tokens[right]
        if tokens.setdefault(merged, content) != content:
            raise TokenizerError(f"merge {rank} gives id {merged} a second meaning.")
        ranks.setdefault((left, right), rank)
    return MergeTable(byte_ids, ranks, [merged for _, _, merged in merges], tokens, whole_first)


def merge_piece(
    piece: bytes, *, table: MergeTable, dropout: float = 0.0, draws: random.Random | None = None
) -> list[int]:
    """Ids of one piece of text; of equal merges the leftmost comes first. With dropout > 0 every merge draws from
    `draws`. Words take the shorter way, n passes of C code over n ranks; beyond LONG_PIECE bytes it is O(n log n)."""
    merge = _merge_long if len(piece) > LONG_PIECE else _merge_short
    draw = draws.random if dropout and draws is not None else None
    return merge([table.byte_ids[value] for value in piece], table=table, dropout=dropout, draw=draw)


def _merge_short(
    symbols: list[int], *, table: MergeTable, dropout: float, draw: Callable[[], float] | None
) -> list[int]:
    """Keep the rank of every pair in a list: the smallest entry is the next merge."""
    rank_of, merged_of = table.ranks.get, table.merged
    ranks = [rank_of(pair, NEVER) for pair in itertools.pairwise(symbols)]
    dropped: list[tuple[int, int]] = []
    while ranks:
        best = min(ranks)
        if best == NEVER:
            break
        place = ranks.index(best)
        if draw is not None and draw() < dropout:
            dropped.append((place, best))
            ranks[place] = NEVER
            continue
        if dropped:
            for other, rank in dropped:
                ranks[other] = rank
            dropped.clear()
        symbols[place] = merged = merged_of[best]
        del ranks[place], symbols[place + 1]
        if place:
            ranks[place - 1] = rank_of((symbols[place - 1], merged), NEVER)
        if place < len(ranks):
            ranks[place] = rank_of((merged, symbols[place + 1]), NEVER)
    return symbols


def _merge_long(
    symbols: list[int], *, table: MergeTable, dropout: float, draw: Callable[[], float] | None
) -> list[int]:
    """Keep pairs in a heap and neighbours in two lists, so that no step walks over the whole piece."""
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
        if draw is not None and draw() < dropout:
            dropped.append(best)
            continue
        symbols[place] = table.merged[best[0]]
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
    rank = table.ranks.get((symbols[place], symbols[other]))
    if rank is not None:
        queue.append((rank, place, symbols[place], symbols[other]))


def _push(queue: list, table: MergeTable, symbols: list[int], place: int, other: int) -> None:
    rank = table.ranks.get((symbols[place], symbols[other]))
    if rank is not None:
        heapq.heappush(queue, (rank, place, symbols[place], symbols[other]))
