"""All tokenizers of a run and the id space that they span, loaded together."""

from __future__ import annotations

import dataclasses

from ernie5.errors import ConfigError
from ernie5.tokenizers.audio.tokenizer import AudioTokenizer, load_audio_tokenizer
from ernie5.tokenizers.config import TokenizersConfig
from ernie5.tokenizers.text import TextTokenizer, load_text_tokenizer
from ernie5.tokenizers.visual.tokenizer import VisualTokenizer, load_visual_tokenizer
from ernie5.tokenizers.vocab import Vocab


@dataclasses.dataclass(frozen=True)
class TokenizerIdentities:
    """sha256 of each tokenizer's content, written into checkpoints and compared when they are loaded."""

    text: str
    visual: str
    audio: str


@dataclasses.dataclass(frozen=True)
class TokenizerBundle:
    """The three tokenizers and the one id space. audio_levels: the first Q codec levels that the model uses."""

    text: TextTokenizer
    visual: VisualTokenizer
    audio: AudioTokenizer
    vocab: Vocab
    identities: TokenizerIdentities

    @property
    def audio_levels(self) -> int:
        """Codec levels Q in use."""
        return self.vocab.audio_levels


def bundle_tokenizers(
    text: TextTokenizer, *, visual: VisualTokenizer, audio: AudioTokenizer, audio_levels: int
) -> TokenizerBundle:
    """Join loaded tokenizers; raises ConfigError when more audio levels are asked for than the codec has."""
    if not 1 <= audio_levels <= audio.levels:
        raise ConfigError(
            f"tokenizers.audio_levels = {audio_levels}, but the audio codec has {audio.levels} levels. "
            f"The model uses the first levels of the codec: choose 1 to {audio.levels}."
        )
    return TokenizerBundle(
        text=text,
        visual=visual,
        audio=audio,
        vocab=Vocab(text_size=text.size, audio_levels=audio_levels, audio_codes=audio.codes),
        identities=TokenizerIdentities(text=text.identity, visual=visual.identity, audio=audio.identity),
    )


def load_tokenizers(config: TokenizersConfig, *, device: str = "cpu") -> TokenizerBundle:
    """Load the tokenizers that `config` names (a path each, or the word `embedded`).

    Visual and audio weights go to `device`. Raises TokenizerError for a file that is missing or damaged.
    """
    return bundle_tokenizers(
        load_text_tokenizer(config.text),
        visual=load_visual_tokenizer(config.visual, device=device),
        audio=load_audio_tokenizer(config.audio, device=device),
        audio_levels=config.audio_levels,
    )
