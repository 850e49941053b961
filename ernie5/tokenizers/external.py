"""External text vocabularies: HF `tokenizer.json` (byte-level BPE) and `.tiktoken` files. Free of HF libraries.

Both hold UTF-8 bytes. Normalisers are left out, so that every text round-trips: ids differ from the original
library's where a normaliser would have changed the text. Text is never read as a special token.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json

from ernie5.errors import TokenizerError

# The split that the published .tiktoken files of chat models were trained with; the files themselves do not say.
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class TextVocabulary:
    """Everything that defines a text tokenizer, alphabet-neutral.

    alphabet: Python codec of the bytes (utf-16-be or utf-8); byte_ids: id per byte value; merges: (left, right, merged)
    in order of rank; extra: tokens that no merge makes; splitter: JSON of the HF pre-tokeniser; piece_characters: ""
    when the splitter returns plain text, else the 256 characters that it writes bytes as; whole_first: see MergeTable.
    """

    alphabet: str
    byte_ids: tuple[int, ...]
    merges: list[tuple[int, int, int]]
    extra: dict[int, bytes]
    splitter: str
    piece_characters: str
    whole_first: bool


def byte_characters() -> str:
    """The 256 characters of byte-level vocabularies: printable Latin-1 stands for itself, the others are shifted."""
    printable = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    shifted = iter(range(256, 512))
    return "".join(chr(value) if value in printable else chr(next(shifted)) for value in range(256))


def read_tokenizer_json(document: dict, *, name: str) -> TextVocabulary:
    """Vocabulary of a parsed `tokenizer.json`. Raises TokenizerError for anything but byte-level BPE."""
    model = document.get("model") or {}
    splitter, found = _without_prefix_space(document.get("pre_tokenizer"))
    if model.get("type", "BPE") != "BPE" or "merges" not in model or not found:
        raise TokenizerError(
            f"{name} is no byte-level BPE vocabulary (model {model.get('type')}). Only BPE with a ByteLevel "
            "pre-tokeniser loses no byte; convert it, or train one with `ernie5 tokenizer train`."
        )
    characters = byte_characters()
    value_of = {character: value for value, character in enumerate(characters)}
    vocab: dict[str, int] = model["vocab"]
    missing = [character for character in characters if character not in vocab]
    if missing:
        raise TokenizerError(f"{name} lacks {len(missing)} of the 256 bytes; a byte-level vocabulary needs them all.")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]
    made = {merged for _, _, merged in merges} | {vocab[character] for character in characters}
    extra = {
        token: bytes(value_of[c] for c in text) if all(c in value_of for c in text) else text.encode()
        for text, token in vocab.items()
        if token not in made
    }
    extra |= {entry["id"]: entry["content"].encode() for entry in document.get("added_tokens") or []}
    return TextVocabulary(
        alphabet="utf-8",
        byte_ids=tuple(vocab[character] for character in characters),
        merges=merges,
        extra={token: content for token, content in extra.items() if token not in made},
        splitter=json.dumps(splitter),
        piece_characters=characters,
        whole_first=bool(model.get("ignore_merges")),
    )


def read_tiktoken(content: str, *, name: str) -> TextVocabulary:
    """Vocabulary of a `.tiktoken` file: lines of base64 token and rank; a token's rank is its id and its priority.

    Every split of a token into two tokens is a merge of the token's rank, which is tiktoken's own rule.
    """
    try:
        pairs = [line.split() for line in content.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{name} is no .tiktoken file ({error}); each line holds base64 and a rank.") from error
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise TokenizerError(f"{name} lacks {len(missing)} of the 256 bytes; a byte-level vocabulary needs them all.")
    byte_ids = tuple(ranks[bytes([value])] for value in range(256))
    merges, extra = [], {}
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        splits = [(ranks.get(token[:cut]), ranks.get(token[cut:])) for cut in range(1, len(token))]
        usable = [(a, b, rank) for a, b in splits if a is not None and b is not None and max(a, b) < rank]
        merges += usable
        if len(token) > 1 and not usable:
            extra[rank] = token
    splitter = {"type": "Split", "pattern": {"Regex": TIKTOKEN_PATTERN}, "behavior": "Isolated", "invert": False}
    return TextVocabulary(
        alphabet="utf-8",
        byte_ids=byte_ids,
        merges=merges,
        extra=extra,
        splitter=json.dumps(splitter),
        piece_characters="",
        whole_first=True,
    )


def _without_prefix_space(state: dict | None) -> tuple[dict | None, bool]:
    """The pre-tokeniser without added spaces, which would not round-trip, and whether it is byte-level."""
    if not isinstance(state, dict):
        return state, False
    if state.get("type") == "ByteLevel":
        return state | {"add_prefix_space": False}, True
    if state.get("type") == "Sequence":
        parts = [_without_prefix_space(part) for part in state["pretokenizers"]]
        return state | {"pretokenizers": [part for part, _ in parts]}, any(found for _, found in parts)
    return state, False
