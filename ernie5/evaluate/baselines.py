"""What the model has to beat, trained on the training split: byte models, xz, unigram words and ids."""

from __future__ import annotations

import dataclasses
import lzma
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ernie5.errors import DataError

BYTE_VALUES = 256
WORD = re.compile(r"[^\W\d_]+", re.UNICODE)


@dataclasses.dataclass(frozen=True)
class CountTable:
    """Counts of byte strings of one length, packed big-endian into sorted keys [N] uint64 beside counts [N] int64."""

    keys: np.ndarray
    counts: np.ndarray

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Counts of `keys` [M] uint64; 0 where a key was never seen."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=np.int64)
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.counts[places], 0)


@dataclasses.dataclass(frozen=True)
class ByteModel:
    """Witten-Bell interpolated byte model (README equation 1); strings[n] counts n + 1 bytes, contexts[n] n bytes.

    kinds[n] holds, per context of n bytes, how many different bytes followed it.
    """

    order: int
    strings: tuple[CountTable, ...]
    contexts: tuple[CountTable, ...]
    kinds: tuple[CountTable, ...]

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Mean bits per byte of `documents`, each coded from its own start."""
        history, _ = _grams(documents, order=self.order)
        if not len(history):
            raise DataError("A byte model was asked about no text at all. The validation split needs one text sample.")
        probability = np.full(len(history), 1.0 / BYTE_VALUES)
        for length in range(self.order + 1):
            strings = _suffix(history, num_bytes=length + 1)
            contexts = strings >> np.uint64(8)
            seen = self.contexts[length].find(contexts)
            kinds = self.kinds[length].find(contexts)
            total = np.maximum(seen + kinds, 1)
            mixed = (self.strings[length].find(strings) + kinds * probability) / total
            probability = np.where(seen > 0, mixed, probability)
        return float(-np.log2(probability).mean())


def train_byte_model(documents: Sequence[bytes], *, order: int) -> ByteModel:
    """Count all strings of up to `order` + 1 bytes of the training `documents`; order 2 looks at two bytes back.

    Raises DataError without text, or when the order does not fit the packed keys (0 to 6).
    """
    if not 0 <= order <= 6:
        raise DataError(f"A byte model of order {order} does not fit its packed keys. Choose an order from 0 to 6.")
    history, _ = _grams(documents, order=order)
    if not len(history):
        raise DataError("A byte model was given no training text. The training split needs one text sample.")
    strings, contexts, kinds = [], [], []
    for length in range(order + 1):
        keys, counts = np.unique(_suffix(history, num_bytes=length + 1), return_counts=True)
        strings.append(CountTable(keys, counts))
        heads, first, distinct = np.unique(keys >> np.uint64(8), return_index=True, return_counts=True)
        contexts.append(CountTable(heads, np.add.reduceat(counts, first)))
        kinds.append(CountTable(heads, distinct))
    return ByteModel(order, tuple(strings), tuple(contexts), tuple(kinds))


def _grams(documents: Sequence[bytes], *, order: int) -> tuple[np.ndarray, int]:
    """Every byte with the `order` bytes before it, packed into one uint64 [M]; before a document stand zero bytes."""
    pieces = []
    for document in documents:
        padded = np.frombuffer(bytes(order) + document, dtype=np.uint8).astype(np.uint64)
        size = len(document)
        packed = np.zeros(size, dtype=np.uint64)
        for offset in range(order + 1):
            packed = (packed << np.uint64(8)) | padded[offset : offset + size]
        pieces.append(packed)
    joined = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint64)
    return joined, len(joined)


def _suffix(history: np.ndarray, *, num_bytes: int) -> np.ndarray:
    return history & np.uint64((1 << (8 * num_bytes)) - 1)


def xz_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Bits per byte of `xz -9` over the documents joined by newlines, which are not counted as text."""
    num_bytes = sum(len(document) for document in documents)
    if num_bytes == 0:
        raise DataError("xz was asked to compress no text at all. The validation split needs one text sample.")
    return 8.0 * len(lzma.compress(b"\n".join(documents), preset=9)) / num_bytes


def words_of(text: str) -> tuple[str, ...]:
    """Lower-case words of a caption; scripts without spaces count each letter as a word."""
    words: list[str] = []
    for word in WORD.findall(text.lower()):
        words.extend(word if any(ord(letter) >= 0x2E80 for letter in word) else (word,))
    return tuple(words)


@dataclasses.dataclass(frozen=True)
class UnigramWords:
    """The most frequent training words, most frequent first: what a captioner without eyes would say."""

    ranked: tuple[str, ...]

    def caption(self, num_words: int) -> str:
        """The `num_words` likeliest words, which hit more than any other choice that does not look."""
        return " ".join(self.ranked[:num_words])


def train_unigram_words(captions: Sequence[str]) -> UnigramWords:
    """Count in how many captions each word occurs; ties fall in alphabetical order."""
    counts = Counter(word for caption in captions for word in set(words_of(caption)))
    return UnigramWords(tuple(sorted(counts, key=lambda word: (-counts[word], word))))


def keyword_hits(text: str, *, keywords: Sequence[str]) -> float:
    """Part of the `keywords` whose words all occur in `text`; 0 without keywords."""
    if not keywords:
        return 0.0
    said = set(words_of(text))
    return sum(bool(words_of(word)) and set(words_of(word)) <= said for word in keywords) / len(keywords)


def unigram_nats(training: Sequence[Sequence[int]], *, validation: Sequence[Sequence[int]], num_ids: int) -> float:
    """Mean nats per id of `validation` under add-one smoothed id counts of `training`."""
    counts = np.ones(num_ids, dtype=np.float64)
    for ids in training:
        np.add.at(counts, np.asarray(ids, dtype=np.int64), 1.0)
    nats = -np.log(counts / counts.sum())
    used = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in validation] or [np.zeros(0, dtype=np.int64)])
    if not len(used):
        raise DataError("The unigram baseline was asked about no ids. The validation split needs one such sample.")
    return float(nats[used].mean())
