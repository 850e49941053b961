"""A run keeps the tokenizers that it was trained with, so that a new embedded set or a moved file strands no run."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ernie5.errors import EnvironmentFault, TokenizerError
from ernie5.observe.faults import refusal_of
from ernie5.observe.log import get_log
from ernie5.tokenizers.config import TokenizersConfig
from ernie5.tokenizers.text import FILE_NAME as TEXT_FILE
from ernie5.tokenizers.text import load_text_tokenizer
from ernie5.tokenizers.weights import FILE_NAME as WEIGHTS_FILE
from ernie5.tokenizers.weights import load_weights

KEPT_FOLDER = "tokenizers"
LEARNED = ("visual", "audio")
KINDS = ("text", *LEARNED)
QUALITY_FILE = "quality.json"


def keep_tokenizers(config: TokenizersConfig, *, folder: Path) -> None:
    """Copy the tokenizers that `config` names to `folder`/{text,visual,audio}, each file atomically.

    What is there already stays. Raises EnvironmentFault when the disk refuses.
    """
    try:
        text = load_text_tokenizer(config.text)
        if _identity("text", folder / "text") != text.identity:
            text.save(folder / "text" / TEXT_FILE)
        for kind in LEARNED:
            stored = load_weights(vars(config)[kind], kind=kind)
            if _identity(kind, folder / kind) != stored.identity:
                _copy(stored.path, target=folder / kind / WEIGHTS_FILE)
                if (stored.path.parent / QUALITY_FILE).is_file():  # what the report says about the run's tokenizers
                    _copy(stored.path.parent / QUALITY_FILE, target=folder / kind / QUALITY_FILE)
    except OSError as error:
        raise EnvironmentFault(f"Cannot keep the tokenizers in {folder}: {refusal_of(error)}.") from error


def prefer_kept(
    config: TokenizersConfig, *, identities: dict[str, str], folders: Sequence[Path]
) -> TokenizersConfig:
    """`config` with every tokenizer whose identity is not the wanted one replaced by the one kept in `folders` that
    has it. Each replacement is said once; a tokenizer that was kept nowhere stays as configured."""
    changes: dict[str, str] = {}
    for kind in KINDS:
        place, wanted = vars(config)[kind], identities.get(kind)
        if wanted is None or _identity(kind, place) == wanted:
            continue
        kept = next((folder / kind for folder in folders if _identity(kind, folder / kind) == wanted), None)
        if kept is not None:
            changes[kind] = str(kept)
            get_log().info("tokenizers.%s = %s is not the tokenizer of this run; using its own, %s", kind, place, kept)
    return dataclasses.replace(config, **changes) if changes else config


def bring_kept(target: Path, *, identities: Mapping[str, str], folders: Sequence[Path]) -> None:
    """Copy to `target`/{text,visual,audio} what `folders` keep of the tokenizers that have these identities."""
    for kind in KINDS:
        wanted = identities.get(kind)
        kept = next((f / kind for f in folders if wanted is not None and _identity(kind, f / kind) == wanted), None)
        if kept is not None:
            shutil.copytree(kept, target / kind, dirs_exist_ok=True)


def _identity(kind: str, place: str | Path) -> str | None:
    """The identity of the tokenizer at `place`, None where there is none that can be read."""
    try:
        return load_text_tokenizer(place).identity if kind == "text" else load_weights(place, kind=kind).identity
    except TokenizerError:
        return None


def _copy(source: Path, *, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)
