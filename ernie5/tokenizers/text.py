"""Text to ids and back: byte-level BPE, over UTF-16BE for vocabularies of our own (SPEC section 2, Text).

A text is split on code points into words, numbers, runs of Han characters, punctuation and white space; each piece is
written in the vocabulary's alphabet (UTF-16BE here, UTF-8 in most external vocabularies; the class hides which) and
merged byte pair by byte pair. Bytes that are no text pass through as single bytes, so every byte string comes back.

The one home of HF `tokenizers`: it trains merges, splits text, and reads `tokenizer.json`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ernie5.errors import TokenizerError
from ernie5.observe.files import replace_file
from ernie5.tokenizers.bpe import MergeTable, build_table, merge_piece
from ernie5.tokenizers.external import TextVocabulary, read_tiktoken, read_tokenizer_json

FILE_NAME = "text.json"
FORMAT = "ernie5-text-1"
KINDS_OF_FILE = "`embedded`, a directory of `ernie5 tokenizer train`, a tokenizer.json or a .tiktoken file."
HAN = r"\p{Han}\p{Hiragana}\p{Katakana}"
PATTERN = (
    rf"[{HAN}]+| ?(?:(?![{HAN}])[\p{{L}}\p{{M}}])+| ?\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}{HAN}]+|\s+(?!\S)|\s+"
)
SURROGATES = re.compile("[\ud800-\udfff]+")
HALF_PAIR = re.compile(r"[\ud800-\udbff]\Z")
# One printable character per byte value: what HF's trainer sees in place of bytes.
STAND_INS = [chr(0x100 + value) for value in range(256)]
CACHE_PIECES = 1 << 17


class TextTokenizer:
    """A text vocabulary: encode, decode, size, identity. Deterministic; dropout is keyed by the caller's seed."""

    def __init__(self, vocabulary: TextVocabulary) -> None:
        self._vocabulary = vocabulary
        self._table: MergeTable = build_table(
            vocabulary.byte_ids,
            merges=vocabulary.merges,
            extra=vocabulary.extra,
            whole_first=vocabulary.whole_first,
        )
        self._whole = {content: token for token, content in self._table.tokens.items()}
        self._splitter = _splitter(vocabulary.splitter)
        self._mapped = {character: value for value, character in enumerate(vocabulary.piece_characters)}
        self._cache: dict[bytes, list[int]] = {}
        self.size: int = self._table.size
        self.alphabet: str = vocabulary.alphabet
        self.identity: str = hashlib.sha256(_document(vocabulary).encode()).hexdigest()

    def encode(self, text: str | bytes, *, dropout: float = 0.0, seed: int | None = None) -> list[int]:
        """Ids of a text, or of bytes in the vocabulary's own alphabet (any bytes, valid text or not).

        dropout: probability that a merge is skipped (BPE-dropout), drawn from `seed`, which is then required.
        """
        if dropout and seed is None:
            raise TokenizerError("BPE-dropout needs a seed, or the stream could not be repeated. Pass seed=...")
        ids: list[int] = []
        if dropout:
            draws = random.Random(seed)
            for piece in self._pieces(text):
                ids += merge_piece(piece, table=self._table, dropout=dropout, draws=draws)
            return ids
        for piece in self._pieces(text):
            ids += self._merged(piece)
        return ids

    def decode(self, ids: Sequence[int], *, exact: bool = True) -> str:
        """Text of `ids`, the inverse of `encode` for every str (two lone surrogates in a row that make a pair come back
        as their character). Bytes that are no text become U+FFFD.

        exact=False is for what is shown: it replaces lone surrogates, which no output encoding accepts, and leaves out
        half a character at the end, where a limit on tokens may cut. Raises TokenizerError for an id that is no text
        id.
        """
        content = self.decode_bytes(ids)
        if self.alphabet == "utf-16-be":
            text = content[: len(content) // 2 * 2].decode("utf-16-be", "surrogatepass")
            text += "\ufffd" if exact and len(content) % 2 else ""
        else:
            text = _decode_utf8(content) if exact else codecs.getincrementaldecoder("utf-8")("replace").decode(content)
        return text if exact else SURROGATES.sub("\ufffd", HALF_PAIR.sub("", text))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids` in the vocabulary's alphabet, the inverse of `encode` for bytes."""
        try:
            return b"".join([self._table.tokens[int(token)] for token in ids])
        except KeyError as error:
            raise TokenizerError(
                f"id {error.args[0]} is no text id of this vocabulary of {self.size}. Media and special ids must be "
                "taken out before decoding."
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the vocabulary into directory `path` (or to a path that ends in .json); returns the file."""
        target = Path(path)
        target = target if target.suffix == ".json" else target / FILE_NAME
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, content=f"{_document(self._vocabulary)}\n".encode())
        return target

    def _merged(self, piece: bytes) -> list[int]:
        found = self._cache.get(piece)
        if found is None:
            whole = self._whole.get(piece) if self._table.whole_first else None
            found = [whole] if whole is not None else merge_piece(piece, table=self._table)
            if len(self._cache) < CACHE_PIECES:
                self._cache[piece] = found
        return found

    def _pieces(self, text: str | bytes) -> Iterator[bytes]:
        errors, tail = "surrogatepass", b""
        if isinstance(text, bytes) and self.alphabet == "utf-16-be":
            even = len(text) // 2 * 2
            text, tail = text[:even].decode("utf-16-be", "surrogatepass"), text[even:]
        elif isinstance(text, bytes):
            text, errors = text.decode("utf-8", "surrogateescape"), "surrogateescape"
        start = 0
        for match in SURROGATES.finditer(text):
            yield from self._split(text[start : match.start()])
            yield match.group().encode(self.alphabet, errors)
            start = match.end()
        yield from self._split(text[start:] if start else text)
        if tail:
            yield tail

    def _split(self, text: str) -> Iterator[bytes]:
        if not text:
            return
        pieces = self._splitter.pre_tokenize_str(text)
        if self._mapped:
            for piece, _ in pieces:
                yield bytes([self._mapped[character] for character in piece])
        else:
            for piece, _ in pieces:
                yield piece.encode(self.alphabet)


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """Load `embedded`, a directory or file that `save` wrote, a `tokenizer.json` (byte-level BPE) or a `.tiktoken`.

    Raises TokenizerError that names the file and what is wrong with it.
    """
    if str(path) == "embedded":
        content = resources.files("ernie5.tokenizers").joinpath("embedded", "text", FILE_NAME).read_text("utf-8")
        return TextTokenizer(_parse(content, "the embedded text vocabulary"))
    target = Path(path)
    if target.is_dir():
        own, external = target / FILE_NAME, target / "tokenizer.json"
        target = external if external.exists() and not own.exists() else own
    try:
        content = target.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(
            f"tokenizers.text = {path} cannot be read ({error}). Give {KINDS_OF_FILE}"
        ) from error
    if target.suffix == ".tiktoken":
        return TextTokenizer(read_tiktoken(content, name=str(target)))
    return TextTokenizer(_parse(content, str(target)))


def train_text_tokenizer(texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2) -> TextTokenizer:
    """Learn merges over UTF-16BE from `texts` until the vocabulary has `vocab_size` ids or pairs grow too rare.

    Deterministic for a given sequence of texts. Raises TokenizerError when vocab_size does not hold the 256 bytes.
    """
    if vocab_size < 256:
        raise TokenizerError(f"vocab_size = {vocab_size} is less than the 256 bytes of the alphabet.")
    splitter = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, initial_alphabet=STAND_INS, show_progress=False
    )
    bare.train_from_iterator((_stand_in_words(text, splitter) for text in texts), trainer=trainer)
    model = json.loads(bare.to_str())["model"]
    return TextTokenizer(_own_vocabulary(model["merges"]))


def _own_vocabulary(merges: list[list[str]]) -> TextVocabulary:
    """Own numbering: bytes are 0..255, then one id per new byte string in order of its first merge."""
    ids = {character: value for value, character in enumerate(STAND_INS)}
    triples = []
    for left, right in merges:
        merged = ids.setdefault(left + right, len(ids))
        triples.append((ids[left], ids[right], merged))
    splitter = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return TextVocabulary(
        alphabet="utf-16-be",
        byte_ids=tuple(range(256)),
        merges=triples,
        extra={},
        splitter=json.dumps(splitter),
        piece_characters="",
        whole_first=False,
    )


def _stand_in_words(text: str, splitter: pre_tokenizers.PreTokenizer) -> str:
    clean = SURROGATES.sub("\ufffd", text)
    words = (piece.encode("utf-16-be") for piece, _ in splitter.pre_tokenize_str(clean))
    return "\n".join("".join([STAND_INS[value] for value in word]) for word in words)


def _splitter(state: str) -> pre_tokenizers.PreTokenizer:
    shell = json.loads(Tokenizer(models.BPE()).to_str())
    shell["pre_tokenizer"] = json.loads(state)
    try:
        return Tokenizer.from_str(json.dumps(shell)).pre_tokenizer
    except Exception as error:  # HF raises bare Exception for every malformed description
        raise TokenizerError(f"the vocabulary's pre-tokeniser is not understood: {error}.") from error


def _document(vocabulary: TextVocabulary) -> str:
    """The canonical JSON text: what is saved, and what the identity is the sha256 of."""
    merges = ",\n".join(
        ",".join(f"[{left},{right},{merged}]" for left, right, merged in vocabulary.merges[start : start + 8])
        for start in range(0, len(vocabulary.merges), 8)
    )
    head = {
        "format": FORMAT,
        "alphabet": vocabulary.alphabet,
        "splitter": json.loads(vocabulary.splitter),
        "piece_characters": vocabulary.piece_characters,
        "whole_first": vocabulary.whole_first,
        "byte_ids": [] if vocabulary.byte_ids == tuple(range(256)) else list(vocabulary.byte_ids),
        "extra": {str(token): content.hex() for token, content in sorted(vocabulary.extra.items())},
    }
    return json.dumps(head, sort_keys=True)[:-1] + f',\n"merges": [\n{merges}\n]}}'


def _parse(content: str, name: str) -> TextVocabulary:
    try:
        document = json.loads(content)
        if document.get("format") != FORMAT:
            return read_tokenizer_json(document, name=name)
        return TextVocabulary(
            alphabet=document["alphabet"],
            byte_ids=tuple(document["byte_ids"]) or tuple(range(256)),
            merges=[(left, right, merged) for left, right, merged in document["merges"]],
            extra={int(token): bytes.fromhex(text) for token, text in document["extra"].items()},
            splitter=json.dumps(document["splitter"]),
            piece_characters=document["piece_characters"],
            whole_first=document["whole_first"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            f"{name} is no text vocabulary ({type(error).__name__}: {error}). Give {KINDS_OF_FILE} (tokenizers.text)"
        ) from error


def _decode_utf8(content: bytes) -> str:
    try:
        return content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return content.decode("utf-8", "replace")
