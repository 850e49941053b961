"""Which tokenizers a run uses, and how the text tokenizer is trained. Free of torch."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import field, fraction, positive


@config
class TokenizersConfig(Config):
    """The tokenizers of a run; each a path, or `embedded` for the small set that ships with the package."""

    text: str = field(
        "embedded",
        doc="text tokenizer: directory or text.json of `ernie5 tokenizer train`, a tokenizer.json, or a .tiktoken",
        kind="architecture",
    )
    visual: str = field("embedded", doc="visual tokenizer directory", kind="architecture")
    audio: str = field("embedded", doc="audio codec directory", kind="architecture")
    audio_levels: int = field(
        4, doc="codec levels Q that the model reads and predicts", check=positive, kind="architecture"
    )


@config
class TextTokenizerConfig(Config):
    """Training of the byte-level BPE over UTF-16BE (SPEC section 2, Text)."""

    vocab_size: int = field(
        4096, doc="ids, the 256 bytes included; specials come on top", check=positive, kind="architecture"
    )
    min_frequency: int = field(2, doc="pairs rarer than this are never merged", check=positive, kind="architecture")
    language_balance: float = field(
        0.5,
        doc="a language with n characters weighs n^language_balance: 1 = as found, 0 = all languages alike",
        check=fraction,
        kind="architecture",
    )
    max_characters: int = field(
        20_000_000, doc="characters drawn from the corpus", unit="characters", check=positive, kind="performance"
    )
    seed: int = field(0, doc="draws the texts of languages that are cut down", kind="numerics")

    def validate(self) -> None:
        """The alphabet must fit."""
        if self.vocab_size < 256:
            self.fail("vocab_size", f"vocab_size = {self.vocab_size} is less than the 256 bytes of the alphabet.")
