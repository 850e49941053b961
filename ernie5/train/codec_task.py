"""What the codec training loop asks of a codec: the interface between `train/codec.py` and one kind of codec.

A task owns its networks, its data and its losses; the loop owns optimizers, budget, averaged weights, curves,
checkpoints and the progress bar. `codec_visual.py` and `codec_audio.py` are the two implementations.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class CodecClock:
    """Where training stands: `step` optimizer steps done, `fraction` of the budget (steps or minutes) spent, 0..1."""

    step: int
    fraction: float


@dataclass(frozen=True)
class CodecLosses:
    """Result of one codec forward pass.

    total: 0-d, what is differentiated; parts: detached 0-d tensors or floats for the curves, by name;
    reconstruction and target: what the discriminator compares (any shape the task's discriminator takes), or None.
    """

    total: torch.Tensor
    parts: dict[str, torch.Tensor | float] = field(default_factory=dict)
    reconstruction: torch.Tensor | None = None
    target: torch.Tensor | None = None


@dataclass(frozen=True)
class CodecFacts:
    """What is written beside an exported codec: figures of the last validation and how long it was trained."""

    quality: dict[str, float]
    steps: int
    minutes: float
    parameters: int


class CodecTask(abc.ABC):
    """One codec with its data and losses; all randomness comes from the generator that is passed in."""

    @property
    @abc.abstractmethod
    def codec(self) -> nn.Module:
        """The trained network; its averaged (EMA) copy is validated and exported."""

    @property
    def discriminator(self) -> nn.Module | None:
        """The adversary, with an optimizer of its own, or None."""
        return None

    @abc.abstractmethod
    def draw(self, clock: CodecClock, *, generator: torch.Generator) -> object:
        """One training batch, in whatever form `codec_losses` takes."""

    @abc.abstractmethod
    def codec_losses(self, batch: object, *, clock: CodecClock, generator: torch.Generator) -> CodecLosses:
        """Forward pass and losses of the codec (the adversarial term included, where the task uses one)."""

    def discriminator_loss(self, losses: CodecLosses, *, clock: CodecClock) -> torch.Tensor | None:
        """Loss of the discriminator on the detached reconstruction; None leaves it alone in this step."""
        return None

    def after_step(self, clock: CodecClock, *, generator: torch.Generator) -> None:
        """Called after each optimizer step, for example to revive dead codes."""
        return None

    @abc.abstractmethod
    def validate(self, codec: nn.Module) -> dict[str, float]:
        """Figures on the validation split with `codec` (the averaged weights) in eval mode, under no_grad."""

    @property
    @abc.abstractmethod
    def score(self) -> str:
        """Name of the validation figure that is best when highest; the best averaged weights are kept apart."""

    @abc.abstractmethod
    def export(self, codec: nn.Module, directory: Path, *, facts: CodecFacts) -> None:
        """Write the codec to `directory` in the form that `load_*_tokenizer` reads (bf16 weights and config)."""
