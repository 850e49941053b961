"""The text tokenizer of an exported ernie5 model for AutoTokenizer (trust_remote_code): byte-pair merges over UTF-16BE.

HF `tokenizers` has no step that turns characters into UTF-16 bytes after a text was split by classes of characters
(ByteLevel knows UTF-8 alone), so no tokenizer.json can say this vocabulary. Here it splits; each byte of a piece then
becomes one stand-in character (U+0100 + byte), and its BPE merges those. Tokens are such strings of stand-ins.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizer

VOCAB_FILE = "text.json"
FIRST = 0x100
SURROGATES = re.compile("([\ud800-\udfff]+)")


class Ernie5Tokenizer(PreTrainedTokenizer):
    """Ids as those of ernie5's own tokenizer, and text back from ids; special tokens stand behind the text ids."""

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **options: object) -> None:
        document = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        if document.get("alphabet") != "utf-16-be" or document["byte_ids"] or document["extra"]:
            raise ValueError(f"{vocab_file} is no vocabulary of ernie5's own kind")
        self._file = Path(vocab_file)
        tokens = [chr(FIRST + value) for value in range(256)]
        merges = []
        for left, right, merged in document["merges"]:
            merges.append((tokens[left], tokens[right]))
            if merged == len(tokens):
                tokens.append(tokens[left] + tokens[right])
        self._tokens, self._ids = tokens, {token: number for number, token in enumerate(tokens)}
        self._merger = BPE(vocab=self._ids, merges=merges)
        shell = json.loads(Tokenizer(BPE()).to_str())
        self._splitter = Tokenizer.from_str(json.dumps({**shell, "pre_tokenizer": document["splitter"]})).pre_tokenizer
        options.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        """Number of text ids."""
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        """Text tokens as strings of stand-ins, and the special tokens."""
        return {**self._ids, **self.added_tokens_encoder}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that the bytes behind the stand-ins are; what is no text becomes U+FFFD, special tokens stay."""
        text, content = "", b""
        for token in tokens:
            if token in self._ids:
                content += bytes(ord(character) - FIRST for character in token)
            else:
                text, content = text + _read(content) + token, b""
        return text + _read(content)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the vocabulary's file."""
        target = Path(save_directory) / (f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE)
        if target.resolve() != self._file.resolve():
            shutil.copyfile(self._file, target)
        return (str(target),)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        found = []
        for part in SURROGATES.split(text):
            if not part:
                continue
            pieces = [part] if SURROGATES.match(part) else [p for p, _ in self._splitter.pre_tokenize_str(part)]
            for piece in pieces:
                stand_ins = "".join(chr(FIRST + value) for value in piece.encode("utf-16-be", "surrogatepass"))
                found += [token.value for token in self._merger.tokenize(stand_ins)]
        return found

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens[index] if index < len(self._tokens) else f"<{index}>"


def _read(content: bytes) -> str:
    text = content[: len(content) // 2 * 2].decode("utf-16-be", "surrogatepass")
    return SURROGATES.sub("\ufffd", text) + ("\ufffd" if len(content) % 2 else "")
