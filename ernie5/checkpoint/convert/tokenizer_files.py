"""Tokenizer files on the way in and out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from importlib import resources
from pathlib import Path

from ernie5.checkpoint.convert.ernie45_config import SpecialIds
from ernie5.checkpoint.convert.source import Source
from ernie5.checkpoint.load import own_tokenizers
from ernie5.errors import TokenizerError
from ernie5.tokenizers.kept import KEPT_FOLDER
from ernie5.tokenizers.text import FILE_NAME, load_text_tokenizer
from ernie5.tokenizers.vocab import SPECIALS, Vocab

FOREIGN = "tokenizer.json"
CODE, CONFIG = "tokenization_ernie5.py", "tokenizer_config.json"
OWN_ALPHABET = "utf-16-be"
SIDE_FILES = (
    FOREIGN, "tokenizer.model", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json",
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
    identities = dict(source.manifest.tokenizers)
    try:
        wanted = {"text": identities.get("text", "")}
        own = own_tokenizers(source.root.tokenizers, directory=source.directory, identities=wanted)
        tokenizer = load_text_tokenizer(own.text)
    except TokenizerError as error:
        return KeptTokenizer(none, f"no tokenizer was written: {error}")
    if tokenizer.identity != identities.get("text"):
        return KeptTokenizer(none, "no tokenizer was written: the one that the model was trained with is not here")
    tokenizer.save(folder / FILE_NAME)
    vocab = Vocab(tokenizer.size, source.root.tokenizers.audio_levels, 2)
    fits = vocab.size_head == source.model.vocab_size
    if tokenizer.alphabet == OWN_ALPHABET:
        write_code(folder, first_special=tokenizer.size if fits else None)
        note = f"{FILE_NAME} is ernie5's own vocabulary: load it with AutoTokenizer and trust_remote_code=True"
    else:
        note = (
            f"{FILE_NAME} is an external vocabulary ({tokenizer.alphabet}) as ernie5 keeps it: AutoTokenizer reads the "
            "tokenizer.json that it was made of, ernie5.tokenizers.text.load_text_tokenizer this file"
        )
    return KeptTokenizer(SpecialIds(vocab.pad, vocab.bos, vocab.eos) if fits else none, note)


def write_code(folder: Path, *, first_special: int | None) -> None:
    """Let AutoTokenizer read the vocabulary of our own kind in `folder`: code, and a config that names it.

    first_special: id of the first of SPECIALS, which follow one another; None: no ids of specials are known.
    """
    code = resources.files("ernie5.checkpoint.remote").joinpath(CODE).read_text("utf-8")
    (folder / CODE).write_text(code, encoding="utf-8")
    names = SPECIALS if first_special is not None else ()
    values: dict[str, object] = {
        "tokenizer_class": "Ernie5Tokenizer",
        "auto_map": {"AutoTokenizer": [f"{CODE.removesuffix('.py')}.Ernie5Tokenizer", None]},
        "added_tokens_decoder": {
            str((first_special or 0) + index): {
                "content": f"<{name}>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                "special": True,
            }
            for index, name in enumerate(names)
        },
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos") if name in names},
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def restore_code(folder: Path) -> None:
    """Put the code beside a vocabulary of ours whose config came along from an earlier export: code is never copied."""
    config = folder / CONFIG
    if (folder / FILE_NAME).is_file() and config.is_file() and "Ernie5Tokenizer" in config.read_text("utf-8"):
        code = resources.files("ernie5.checkpoint.remote").joinpath(CODE).read_text("utf-8")
        (folder / CODE).write_text(code, encoding="utf-8")


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
