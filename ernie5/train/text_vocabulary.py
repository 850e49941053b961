"""Train a text vocabulary on everything that a corpus says: documents, captions, transcripts, pages."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path

from ernie5.config.load import config_to_yaml
from ernie5.data.samples import Sample
from ernie5.data.shards import list_shards, open_corpus
from ernie5.errors import DataError
from ernie5.observe.files import replace_file
from ernie5.tokenizers.config import TextTokenizerConfig, TokenizerRunConfig
from ernie5.tokenizers.text import TextTokenizer, train_text_tokenizer

TRAINING_SPLIT, HELD_OUT_SPLIT = "train", "validation"
DROPOUT = 0.1


@dataclasses.dataclass(frozen=True)
class LanguageText:
    """A piece of text and its language."""

    language: str
    text: str


def train_text_vocabulary(run: TokenizerRunConfig, *, out: Path) -> str:
    """Train, measure on the validation split, write text.json, config.yaml and quality.json into `out`.

    Returns one line for people. Raises DataError when the shards hold no text.
    """
    config, began = run.tokenizer.text, time.monotonic()
    shards = list_shards(run.data.shards)
    texts, held_out = (_read_texts(shards, split=split) for split in (TRAINING_SPLIT, HELD_OUT_SPLIT))
    chosen = balance_languages(texts, config=config, seed=run.train.seed)
    tokenizer = train_text_tokenizer(
        (piece.text for piece in chosen), vocab_size=config.vocab_size, min_frequency=config.min_frequency
    )
    quality = {
        "size": tokenizer.size,
        "identity": tokenizer.identity,
        "seed": run.train.seed,
        "training_characters": sum(len(piece.text) for piece in chosen),
        "utf8_bytes_per_token": measure_compression(tokenizer, held_out),
        "seconds": round(time.monotonic() - began, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    replace_file(out / "config.yaml", content=config_to_yaml(run).encode())
    described = json.dumps(quality, indent=2, ensure_ascii=False)
    replace_file(out / "quality.json", content=f"{described}\n".encode(errors="replace"))
    rates = ", ".join(
        f"{language} {rate['plain']:.2f}" for language, rate in quality["utf8_bytes_per_token"].items()
    )
    return f"{tokenizer.size} ids; validation bytes per token: {rates}\nThe vocabulary is in {out}"


def balance_languages(
    texts: list[LanguageText], *, config: TextTokenizerConfig, seed: int
) -> list[LanguageText]:
    """Draw texts so that a language of n characters weighs n^language_balance, at most max_characters in all.

    The heaviest language relative to its weight is used whole, or up to its share; texts of smaller ones repeat.
    """
    sizes: dict[str, int] = {}
    for piece in texts:
        sizes[piece.language] = sizes.get(piece.language, 0) + len(piece.text)
    if not sizes:
        raise DataError("the shards hold no text in the training split, so there is nothing to learn merges from.")
    weights = {language: size**config.language_balance for language, size in sizes.items()}
    total = min(sum(sizes.values()), config.max_characters)
    chosen: list[LanguageText] = []
    for language in sorted(sizes):
        wanted = round(total * weights[language] / sum(weights.values()))
        pieces = [piece for piece in texts if piece.language == language]
        random.Random(f"{seed} {language}").shuffle(pieces)
        taken, number = 0, 0
        while taken < wanted:
            piece = pieces[number % len(pieces)]
            chosen.append(piece)
            taken, number = taken + len(piece.text), number + 1
    return chosen


def measure_compression(tokenizer: TextTokenizer, texts: Iterable[LanguageText]) -> dict[str, dict[str, float]]:
    """UTF-8 bytes of raw text per token, per language: plain, and with BPE-dropout 0.1."""
    counts: dict[str, list[int]] = {}
    for number, piece in enumerate(texts):
        row = counts.setdefault(piece.language, [0, 0, 0])
        row[0] += len(piece.text.encode("utf-8", "replace"))
        row[1] += len(tokenizer.encode(piece.text))
        row[2] += len(tokenizer.encode(piece.text, dropout=DROPOUT, seed=number))
    return {
        language: {"plain": round(row[0] / row[1], 3), "dropout_0.1": round(row[0] / row[2], 3)}
        for language, row in sorted(counts.items())
    }


def _read_texts(shards: tuple[Path, ...], *, split: str) -> list[LanguageText]:
    corpus = open_corpus(shards, split=split)
    return [piece for ref in corpus.refs for piece in _texts_of(corpus.read(ref)) if piece.text]


def _texts_of(sample: Sample) -> list[LanguageText]:
    meta = sample.meta
    pieces = [LanguageText(caption.language, caption.text) for caption in meta.captions]
    pieces += [LanguageText(meta.language, text) for text in (meta.text, meta.transcript) if text]
    pieces += [LanguageText(meta.language, segment.text) for segment in meta.segments if segment.text]
    return pieces
