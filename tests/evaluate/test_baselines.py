"""Baselines: byte models against a slow reference, and the small measures."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from ernie5.errors import DataError
from ernie5.evaluate import baselines


def _slow_bits(training: list[bytes], *, documents: list[bytes], order: int) -> float:
    counts = [Counter() for _ in range(order + 1)]
    for document in training:
        padded = bytes(order) + document
        for place in range(order, len(padded)):
            for length in range(order + 1):
                counts[length][padded[place - length : place + 1]] += 1
    bits = total = 0.0
    for document in documents:
        padded = bytes(order) + document
        for place in range(order, len(padded)):
            probability = 1 / 256
            for length in range(order + 1):
                context = padded[place - length : place]
                after = {key: n for key, n in counts[length].items() if key[:-1] == context}
                seen = sum(after.values())
                if seen:
                    mine = after.get(context + padded[place : place + 1], 0)
                    probability = (mine + len(after) * probability) / (seen + len(after))
            bits -= math.log2(probability)
            total += 1
    return bits / total


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_the_byte_model_equals_the_slow_reference(order: int) -> None:
    training = [b"the cat sat on the mat", b"a cat", "猫在垫子上".encode(), b"", b"\xff\x00\xff"]
    documents = [b"the mat sat", "猫 cat".encode(), b"z", b"\x00"]
    model = baselines.train_byte_model(training, order=order)
    expected = _slow_bits(training, documents=documents, order=order)
    assert model.bits_per_byte(documents) == pytest.approx(expected, rel=1e-12)


def test_the_byte_model_is_a_distribution_over_all_bytes() -> None:
    model = baselines.train_byte_model([b"abracadabra"], order=2)
    total = sum(2 ** -(model.bits_per_byte([b"ab" + bytes([last])]) * 3 - model.bits_per_byte([b"ab"]) * 2)
                for last in range(256))
    assert total == pytest.approx(1.0, abs=1e-9)


def test_no_text_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="no training text"):
        baselines.train_byte_model([b""], order=2)
    with pytest.raises(DataError, match="no text"):
        baselines.train_byte_model([b"a"], order=2).bits_per_byte([])
    with pytest.raises(DataError, match="no text"):
        baselines.xz_bits_per_byte([b""])


def test_keyword_hits_look_at_whole_words_of_any_script() -> None:
    assert baselines.keyword_hits("A Cat's face", keywords=("cat", "dog")) == 0.5
    assert baselines.keyword_hits("category", keywords=("cat",)) == 0.0
    assert baselines.keyword_hits("一只猫", keywords=("猫",)) == 1.0
    assert baselines.keyword_hits("anything", keywords=()) == 0.0


def test_the_unigram_caption_is_the_likeliest_words() -> None:
    model = baselines.train_unigram_words(["face face", "red face", "red car", "face"])
    assert model.caption(2) == "face red"


def test_unigram_nats_smooth_unseen_ids() -> None:
    assert baselines.unigram_nats([[0, 0]], validation=[[1]], num_ids=2) == pytest.approx(math.log(4))
    with pytest.raises(DataError):
        baselines.unigram_nats([[0]], validation=[], num_ids=2)
