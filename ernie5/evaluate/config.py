"""Settings of `ernie5 evaluate`; torch-free."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import between, field, fraction, non_negative, positive

TEXT_BASELINES = ("order2", "order3", "xz")


@config
class EvaluateConfig(Config):
    """How much is measured; the defaults take about a minute on two CPU cores with the quickstart model."""

    batch_rows: int = field(16, doc="rows of one forward pass", unit="rows", check=positive, kind="performance")
    loss_samples: int = field(
        96, doc="validation samples per task of the losses, the routing figures and video bits; 0: all",
        unit="samples", check=non_negative, kind="logging",
    )
    text_bytes: int = field(
        1_000_000, doc="validation text of bits per byte; whole documents until this is reached; 0: all", unit="bytes",
        check=non_negative, kind="logging",
    )
    training_text_bytes: int = field(
        0, doc="training text of the byte models; 0: all", unit="bytes", check=non_negative, kind="logging"
    )
    caption_samples: int = field(
        100, doc="validation pictures that are captioned, validation prompts that are transcribed", unit="samples",
        check=positive, kind="logging",
    )
    caption_tokens: int = field(24, doc="longest caption or transcript", unit="tokens", check=positive,
                                kind="logging")
    match_samples: int = field(
        100, doc="training prompts of the nearest-target tests", unit="samples", check=positive, kind="logging"
    )
    guidance: float = field(
        3.0, doc="guidance of the nearest-target test of pictures; 1 uses the condition alone", check=non_negative,
        kind="logging",
    )
    audio_guidance: float = field(
        1.0, doc="guidance of the nearest-target test of speech", check=non_negative, kind="logging"
    )
    nearest_goal: float = field(
        0.8, doc="goal of the nearest-target tests; chance is one half", check=fraction, kind="logging"
    )
    text_goals: tuple[str, ...] = field(
        ("order2",),
        doc="what the text has to beat, of order2, order3 (byte models) and xz; the others stand beside it as measures",
        kind="logging",
    )
    seed: int = field(
        0, doc="seed of which samples and which other targets are taken", check=between(0, 2**63 - 1), kind="logging"
    )

    def validate(self) -> None:
        """Goals are names of baselines."""
        for name in self.text_goals:
            if name not in TEXT_BASELINES:
                self.fail("text_goals", f"{name} is no baseline of the text. Choose of {', '.join(TEXT_BASELINES)}")
