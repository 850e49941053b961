"""Tokenizer files on the way in and out."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

from ernie5.checkpoint.convert.ernie45_config import SpecialIds
from ernie5.checkpoint.convert.source import Source
from ernie5.errors import TokenizerError
from ernie5.tokenizers.kept import KEPT_FOLDER, prefer_kept
from ernie5.tokenizers.text import FILE_NAME, load_text_tokenizer
from ernie5.tokenizers.vocab import Vocab

FOREIGN = "tokenizer.json"
SIDE_FILES = (
    FOREIGN, "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE", FILE_NAME,
)


@dataclasses.dataclass(frozen=True)
class KeptTokenizer:
    """Our own tokenizer beside an export: its special ids, and what people should know about it."""

    ids: SpecialIds
    note: str


def copy_side_files(folder: Path, *, target: Path) -> list[str]:
    """Copy the tokenizer and generation files that stand in `folder`; code is never copied. Returns their names."""
    found = [name for name in SIDE_FILES if (folder / name).is_file()]
    for name in found:
        shutil.copyfile(folder / name, target / name)
    return found


def save_own(source: Source, *, folder: Path) -> KeptTokenizer:
    """Write the run's text tokenizer beside an export of one of our checkpoints."""
    none = SpecialIds(None, None, None)
    places = (source.directory.absolute().parent.parent / KEPT_FOLDER, source.directory / KEPT_FOLDER)
    identities = dict(source.manifest.tokenizers)
    try:
        wanted = {"text": identities.get("text", "")}
        place = prefer_kept(source.root.tokenizers, identities=wanted, folders=places).text
        tokenizer = load_text_tokenizer(place)
    except TokenizerError as error:
        return KeptTokenizer(none, f"no tokenizer was written: {error}")
    if tokenizer.identity != identities.get("text"):
        return KeptTokenizer(none, "no tokenizer was written: the one that the model was trained with is not here")
    tokenizer.save(folder / FILE_NAME)
    vocab = Vocab(tokenizer.size, source.root.tokenizers.audio_levels, 2)
    note = (
        f"{FILE_NAME} is ernie5's own vocabulary ({tokenizer.alphabet}): AutoTokenizer cannot read it, make ids with "
        "ernie5.tokenizers.text.load_text_tokenizer"
    )
    if vocab.size_head != source.model.vocab_size:
        return KeptTokenizer(none, note)
    return KeptTokenizer(SpecialIds(vocab.pad, vocab.bos, vocab.eos), note)


def keep_foreign(stash: Path, *, checkpoint: Path) -> str | None:
    """Keep a tokenizer that ernie5 can use where generation looks for it; returns its identity, None where none is."""
    for name in (FILE_NAME, FOREIGN):
        if (stash / name).is_file():
            try:
                identity = load_text_tokenizer(stash / name).identity
            except TokenizerError:
                continue
            kept = checkpoint / KEPT_FOLDER / "text"
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stash / name, kept / name)
            return identity
    return None


def identify_foreign(stash: Path) -> str:
    """An identity that no tokenizer of ours has, so that ids of the wrong vocabulary are refused."""
    digest = hashlib.sha256(b"foreign")
    for name in (FOREIGN, "tokenizer.model"):
        if (stash / name).is_file():
            digest.update((stash / name).read_bytes())
    return digest.hexdigest()
