"""Settings of generation; torch-free. The command line overrides single fields."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import between, field, fraction, non_negative, positive


@config
class GenerateConfig(Config):
    """How a checkpoint writes, draws, films and speaks."""

    temperature: float = field(0.0, doc="softmax temperature of text; 0 is greedy", check=non_negative, kind="logging")
    top_k: int = field(
        0, doc="text ids or audio codes kept before sampling; 0 keeps all", check=non_negative, kind="logging"
    )
    top_p: float = field(
        1.0, doc="probability mass of text ids or audio codes kept before sampling", check=fraction, kind="logging"
    )
    repetition_penalty: float = field(
        1.0, doc="divides the positive and multiplies the negative logits of ids seen before", check=positive,
        kind="logging",
    )
    beam: int = field(1, doc="beams of text search; 1 is greedy or sampled", check=positive, kind="logging")
    guidance: float = field(
        3.0, doc="classifier-free guidance of pictures and clips; 1 uses the condition alone",
        check=non_negative, kind="logging",
    )
    audio_guidance: float = field(
        1.0, doc="classifier-free guidance of speech; 1 uses the condition alone", check=non_negative, kind="logging"
    )
    bit_temperature: float = field(
        0.5, doc="temperature of picture bits; 0 takes the likelier bit", check=non_negative, kind="logging"
    )
    audio_temperature: float = field(
        0.6, doc="softmax temperature of audio codes; 0 is greedy", check=non_negative, kind="logging"
    )
    max_text_tokens: int = field(64, doc="longest text", unit="tokens", check=positive, kind="logging")
    max_audio_frames: int = field(75, doc="longest speech (12.5 frames/s)", unit="frames", check=positive,
                                  kind="logging")
    video_frames: int = field(17, doc="frames of a clip, 1 + 4n", unit="frames", check=positive, kind="logging")
    frames_per_second: int = field(8, doc="speed of a written clip", unit="1/s", check=positive, kind="logging")
    seed: int = field(0, doc="seed of every random draw", check=between(0, 2**63 - 1), kind="logging")

    def validate(self) -> None:
        """Refuse clips that the causal tokenizer cannot make, an empty nucleus, and what a beam would ignore."""
        if (self.video_frames - 1) % 4:
            self.fail("video_frames", f"{self.video_frames} frames are not 1 + 4n; nearest that work: "
                      f"{1 + 4 * ((self.video_frames - 1) // 4)}, {5 + 4 * ((self.video_frames - 1) // 4)}.")
        if self.top_p <= 0.0:
            self.fail("top_p", "0 keeps no token. Use a value in (0, 1]; 1 keeps all.")
        if self.beam > 1 and (self.temperature > 0.0 or self.repetition_penalty != 1.0):
            self.fail("beam", f"a search of {self.beam} beams draws nothing and penalises nothing, so temperature = "
                      f"{self.temperature} and repetition_penalty = {self.repetition_penalty} would have no effect. "
                      "Use temperature 0 and repetition_penalty 1 beside it, or beam 1.")
