"""The one id space: nothing overlaps, and every id has exactly one meaning."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ernie5.errors import TokenizerError
from ernie5.tokenizers.vocab import SPECIALS, Vocab


def test_every_id_has_one_meaning_and_the_spaces_follow_one_another() -> None:
    vocab = Vocab(text_size=300, audio_levels=3, audio_codes=10)
    places = [vocab.describe(token) for token in range(vocab.size_total)]
    assert len({(p.space, p.level, p.local) for p in places}) == vocab.size_total == vocab.size_head + 30
    order = list(dict.fromkeys(place.space for place in places))
    assert order == ["text", "special", "unused", "audio"]


def test_specials_are_distinct_and_lie_between_text_and_the_end_of_the_head() -> None:
    vocab = Vocab(text_size=4096, audio_levels=4, audio_codes=1024)
    ids = [getattr(vocab, name) for name in SPECIALS]
    assert len(set(ids)) == len(SPECIALS)
    assert all(vocab.text_size <= token < vocab.size_head for token in ids)
    assert [vocab.describe(token).name for token in ids] == list(SPECIALS)


@pytest.mark.parametrize(("text_size", "head"), [(256, 320), (304, 320), (305, 384), (4096, 4160)])
def test_the_head_has_a_multiple_of_64_rows(text_size: int, head: int) -> None:
    assert Vocab(text_size=text_size, audio_levels=1, audio_codes=2).size_head == head


def test_audio_ids_are_level_major_and_invert() -> None:
    vocab = Vocab(text_size=256, audio_levels=2, audio_codes=5)
    assert vocab.audio_id(0, 0) == vocab.size_head
    place = vocab.describe(vocab.audio_id(1, 3))
    assert (place.space, place.level, place.local) == ("audio", 1, 3)


def test_ids_outside_the_space_are_refused() -> None:
    vocab = Vocab(text_size=256, audio_levels=2, audio_codes=5)
    for bad in (-1, vocab.size_total):
        with pytest.raises(TokenizerError, match="outside"):
            vocab.describe(bad)
    for level, code in ((2, 0), (0, 5), (-1, 0), (0, -1)):
        with pytest.raises(TokenizerError, match="outside"):
            vocab.audio_id(level, code)
    with pytest.raises(TokenizerError, match="256 bytes"):
        Vocab(text_size=255, audio_levels=1, audio_codes=2)


def test_the_id_space_is_readable_without_torch() -> None:
    code = "import sys, ernie5.tokenizers.vocab; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
