"""The one id space: text, specials, head padding, audio codes; and its inverse. Free of torch.

    [0, text_size)                    text ids of the byte-level BPE
    [text_size, text_size + 16)       specials and media placeholders, in the order of SPECIALS
    [.., size_head)                   unused, so that text embedding and head have a multiple of 64 rows
    [size_head, size_total)           audio codes, level-major: size_head + level * audio_codes + code

Nothing overlaps (SPEC section 7). Pictures and clips have no ids: their cells carry bits, and a vocabulary of 2^d is
never materialised; a position that holds a cell, a patch or an audio frame carries a placeholder id.
"""

from __future__ import annotations

import dataclasses

from ernie5.errors import TokenizerError

SPECIALS = (
    "pad",
    "bos",
    "eos",
    "sep",
    "boi",
    "eoi",
    "bov",
    "eov",
    "boa",
    "eoa",
    "spk",
    "image_und",
    "video_und",
    "image_gen",
    "video_gen",
    "audio_frame",
)
HEAD_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class TokenPlace:
    """Where a global id lies: `space` is text, special, unused or audio; `local` counts from 0 in that space (audio:
    the code, with `level` beside it); `name` is for people."""

    space: str
    local: int
    name: str
    level: int = 0


@dataclasses.dataclass(frozen=True)
class Vocab:
    """The global id space. text_size: ids of the text tokenizer; audio_levels Q and audio_codes C of the codec."""

    text_size: int
    audio_levels: int
    audio_codes: int

    def __post_init__(self) -> None:
        if self.text_size < 256 or self.audio_levels < 1 or self.audio_codes < 2:
            raise TokenizerError(
                f"a vocabulary of {self.text_size} text ids, {self.audio_levels} audio levels and {self.audio_codes} "
                "codes is impossible. Text needs the 256 bytes, audio at least one level of two codes."
            )

    def special(self, name: str) -> int:
        """Global id of the special called `name`."""
        return self.text_size + SPECIALS.index(name)

    @property
    def pad(self) -> int:
        """Fills rows behind their last document; never a target."""
        return self.special("pad")

    @property
    def bos(self) -> int:
        """First token of every document."""
        return self.special("bos")

    @property
    def eos(self) -> int:
        """Last token of every document."""
        return self.special("eos")

    @property
    def sep(self) -> int:
        """Ends the condition: what follows is to be generated."""
        return self.special("sep")

    @property
    def boi(self) -> int:
        """Begins an image; predicts scale 1 of a picture to be drawn."""
        return self.special("boi")

    @property
    def eoi(self) -> int:
        """Ends an image."""
        return self.special("eoi")

    @property
    def bov(self) -> int:
        """Begins a clip; predicts scale 1 of its first latent frame."""
        return self.special("bov")

    @property
    def eov(self) -> int:
        """Ends a clip."""
        return self.special("eov")

    @property
    def boa(self) -> int:
        """Begins audio; predicts the first frame of sound to be spoken."""
        return self.special("boa")

    @property
    def eoa(self) -> int:
        """Ends audio; the input of the end frame."""
        return self.special("eoa")

    @property
    def spk(self) -> int:
        """Holds a speaker embedding."""
        return self.special("spk")

    @property
    def image_und(self) -> int:
        """Placeholder of an image understanding position."""
        return self.special("image_und")

    @property
    def video_und(self) -> int:
        """Placeholder of a video understanding position."""
        return self.special("video_und")

    @property
    def image_gen(self) -> int:
        """Placeholder of a cell of a picture to be drawn."""
        return self.special("image_gen")

    @property
    def video_gen(self) -> int:
        """Placeholder of a cell of a clip to be drawn."""
        return self.special("video_gen")

    @property
    def audio_frame(self) -> int:
        """Placeholder of an audio frame."""
        return self.special("audio_frame")

    @property
    def size_head(self) -> int:
        """Rows of the text embedding and head; `model.vocab_size` must equal it."""
        used = self.text_size + len(SPECIALS)
        return -(-used // HEAD_MULTIPLE) * HEAD_MULTIPLE

    @property
    def size_total(self) -> int:
        """All ids, audio codes included."""
        return self.size_head + self.audio_levels * self.audio_codes

    def audio_id(self, level: int, code: int) -> int:
        """Global id of `code` (0..C-1) at `level` (0..Q-1); raises TokenizerError outside."""
        if not (0 <= level < self.audio_levels and 0 <= code < self.audio_codes):
            raise TokenizerError(
                f"audio level {level}, code {code} lies outside {self.audio_levels} levels of {self.audio_codes} codes."
            )
        return self.size_head + level * self.audio_codes + code

    def describe(self, token_id: int) -> TokenPlace:
        """The inverse: space and local number of a global id; raises TokenizerError outside [0, size_total)."""
        if not 0 <= token_id < self.size_total:
            raise TokenizerError(f"id {token_id} lies outside the id space [0, {self.size_total}).")
        if token_id < self.text_size:
            return TokenPlace("text", token_id, f"text {token_id}")
        if token_id < self.text_size + len(SPECIALS):
            local = token_id - self.text_size
            return TokenPlace("special", local, SPECIALS[local])
        if token_id < self.size_head:
            local = token_id - self.text_size - len(SPECIALS)
            return TokenPlace("unused", local, f"unused {local}")
        level, code = divmod(token_id - self.size_head, self.audio_codes)
        return TokenPlace("audio", code, f"audio level {level} code {code}", level)
