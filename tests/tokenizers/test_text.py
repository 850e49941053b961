"""Text to ids and back: every string and every byte string, with and without dropout, own and external vocabularies."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import pytest
import tokenizers

from ernie5.errors import TokenizerError
from ernie5.tokenizers import bpe
from ernie5.tokenizers.bpe import build_table, merge_piece
from ernie5.tokenizers.text import TextTokenizer, load_text_tokenizer, train_text_tokenizer

CORPUS = ["the cat sat on the mat, the dog barked at the cat", "床前明月光，疑是地上霜。", "съешь ещё этих мягких"] * 30
HOSTILE = [
    "", " ", "\n", "a", "\x00", "the  cat\t\n\n end ", "日本語テスト 中文。", "😀👩‍👩‍👧‍👦 flag 🇮🇹",
    "e\u0301 vs \u00e9",
    "\ud800", "x\udc00y\udbff", "\U0010ffff\ufeff\ufffe",
    "ا ب ت हिन्दी ไทย", "1234567 3.14", "a" * 3000, "_under_score",
]


@pytest.fixture(scope="module")
def small() -> TextTokenizer:
    return train_text_tokenizer(CORPUS, vocab_size=400)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.9, 1.0])
def test_any_string_comes_back(small: TextTokenizer, text: str, dropout: float) -> None:
    assert small.decode(small.encode(text, dropout=dropout, seed=1)) == text


def test_any_byte_string_comes_back_odd_ones_and_lone_bytes_included(small: TextTokenizer) -> None:
    draws = random.Random(0)
    for length in [0, 1, 2, 3, 63, 64] + list(range(4, 40)):
        content = draws.randbytes(length)
        assert small.decode_bytes(small.encode(content)) == content
        assert small.decode_bytes(small.encode(content, dropout=0.3, seed=length)) == content
    for value in range(256):
        assert small.decode_bytes(small.encode(bytes([value]))) == bytes([value])


def test_a_text_and_its_bytes_have_the_same_ids(small: TextTokenizer) -> None:
    for text in HOSTILE:
        assert small.encode(text) == small.encode(text.encode("utf-16-be", "surrogatepass"))


def test_shown_text_has_no_lone_surrogates_and_half_a_character_becomes_a_mark(small: TextTokenizer) -> None:
    assert small.decode(small.encode("a\ud800b"), exact=False) == "a\ufffdb"
    assert small.decode(small.encode(b"\x00a\x00")) == "a\ufffd"


def test_dropout_is_a_function_of_its_seed_and_splits_more(small: TextTokenizer) -> None:
    text = CORPUS[0]
    plain, dropped = small.encode(text), small.encode(text, dropout=0.2, seed=7)
    assert dropped == small.encode(text, dropout=0.2, seed=7)
    assert len({tuple(small.encode(text, dropout=0.2, seed=seed)) for seed in range(20)}) > 10
    assert len(dropped) > len(plain)
    assert len(small.encode(text, dropout=1.0, seed=0)) == 2 * len(text)
    with pytest.raises(TokenizerError, match="seed"):
        small.encode(text, dropout=0.1)


def test_no_piece_holds_a_space_behind_its_first_character_and_pieces_join_to_the_text(small: TextTokenizer) -> None:
    for text in CORPUS[:3]:
        words = [small.decode([token]) for token in small.encode(text)]
        assert "".join(words) == text
        assert not any(" " in word[1:] for word in words)


def test_training_is_repeatable_and_a_saved_vocabulary_keeps_its_identity(
    small: TextTokenizer, tmp_path: Path
) -> None:
    again = train_text_tokenizer(CORPUS, vocab_size=400)
    assert again.identity == small.identity and again.size == small.size <= 400
    small.save(tmp_path)
    loaded = load_text_tokenizer(tmp_path)
    assert loaded.identity == small.identity
    assert loaded.encode(CORPUS[0]) == small.encode(CORPUS[0])
    assert train_text_tokenizer(CORPUS, vocab_size=300).identity != small.identity


def test_the_embedded_vocabulary_loads_and_compresses() -> None:
    text = "the quick brown fox said unto the people"
    embedded = load_text_tokenizer("embedded")
    assert embedded.size == 4096
    assert embedded.decode(embedded.encode(text)) == text
    assert len(embedded.encode(text)) < len(text) / 2


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "ernie5-text-1"}', '{"model": {"type": "WordPiece"}}'])
def test_a_file_that_is_no_vocabulary_is_one_clear_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json.*`ernie5 tokenizer train`"):
        load_text_tokenizer(path)


def test_a_missing_file_and_a_foreign_id_are_named(small: TextTokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere"):
        load_text_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match="no text id"):
        small.decode([small.size])


def test_an_external_tokenizer_json_gives_the_ids_of_its_own_library(tmp_path: Path) -> None:
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator(CORPUS, vocab_size=400, min_frequency=2, show_progress=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_text_tokenizer(tmp_path / "tokenizer.json")
    for text in CORPUS[:3] + ["the cat's 12 mats\n\n  😀", "naïve"]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text, dropout=0.5, seed=2)) == text
    content = bytes(range(256)) * 2
    assert ours.decode_bytes(ours.encode(content)) == content
    ours.save(tmp_path / "own")
    assert load_text_tokenizer(tmp_path / "own").identity == ours.identity


def test_an_external_tiktoken_file_gives_the_ids_of_tiktoken(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from ernie5.tokenizers.external import TIKTOKEN_PATTERN

    tokens = [bytes([value]) for value in range(256)] + [
        b"th", b"the", b" t", b" the", b"at", b" c", b" cat", b"xq", b"\xe5\xba", b"\xe5\xba\x8a", b" do", b" dog",
    ]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding("small", pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = load_text_tokenizer(path)
    for text in CORPUS[:3] + ["xqxq the xq", "don't 123"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_damaged_tiktoken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.tiktoken"
    for content, reason in (("!!!! 1", "no .tiktoken"), ("YQ== 0", "lacks 255")):
        path.write_text(content, "utf-8")
        with pytest.raises(TokenizerError, match=reason):
            load_text_tokenizer(path)


def test_merging_takes_the_lowest_rank_first_and_the_leftmost_of_equals() -> None:
    a, b, c = (ord(letter) for letter in "abc")
    table = build_table(tuple(range(256)), merges=[(b, c, 256), (a, b, 257), (a, a, 258)], extra={}, whole_first=False)
    assert merge_piece(b"abc", table=table) == [a, 256]
    assert merge_piece(b"aaa", table=table) == [258, a]
    assert merge_piece(b"", table=table) == []


@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_short_and_long_pieces_are_merged_alike(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    draws = random.Random(3)
    merges = [(97, 98, 256), (98, 97, 257), (256, 256, 258), (97, 97, 259), (257, 256, 260), (258, 98, 261)]
    table = build_table(tuple(range(256)), merges=merges, extra={}, whole_first=False)
    pieces = [bytes(draws.choices(b"abc", k=length)) for length in range(60)]
    results = []
    for limit in (0, 1000):
        monkeypatch.setattr(bpe, "LONG_PIECE", limit)
        seeded = random.Random(7)
        merged = [merge_piece(piece, table=table, dropout=dropout, draws=seeded) for piece in pieces]
        results.append((merged, seeded.random()))
    assert results[0] == results[1]


def test_a_merge_of_unknown_ids_or_with_two_meanings_is_refused() -> None:
    for merges in ([(300, 97, 301)], [(97, 98, 256), (97, 99, 256)]):
        with pytest.raises(TokenizerError, match="merge"):
            build_table(tuple(range(256)), merges=merges, extra={}, whole_first=False)


def test_saved_vocabularies_are_json(small: TextTokenizer, tmp_path: Path) -> None:
    document = json.loads(small.save(tmp_path / "v.json").read_text("utf-8"))
    assert document["alphabet"] == "utf-16-be" and len(document["merges"]) >= small.size - 256


def test_any_ids_of_the_embedded_vocabulary_decode_to_text_that_can_be_shown() -> None:
    embedded, draws = load_text_tokenizer("embedded"), random.Random(11)
    for length in (0, 1, 2, 3, 17, 400):
        for _ in range(40):
            ids = draws.choices(range(embedded.size), k=length)
            assert isinstance(embedded.decode(ids), str)
            embedded.decode(ids, exact=False).encode("utf-8")
    for token in range(embedded.size):
        embedded.decode([token], exact=False).encode("utf-8")


@pytest.mark.parametrize("end", [b"\x00", b"\xd8\x3d", b"\xd8\x3d\xde"])
def test_half_a_character_at_the_end_is_left_out_of_what_is_shown(small: TextTokenizer, end: bytes) -> None:
    ids = small.encode("ab 猫".encode("utf-16-be") + end)
    assert small.decode(ids, exact=False) == "ab 猫"
    assert small.decode(ids) != "ab 猫"
