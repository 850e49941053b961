"""What happens around steps: the interface of hooks, what they see, and how one of them sends the run back."""

from __future__ import annotations

import dataclasses

from ernie5.engine.interface import StepReport, StepSums


@dataclasses.dataclass(frozen=True)
class StepContext:
    """What hooks see of one step; `step` counts from 1. seconds: the whole step; data_seconds: waiting for data."""

    step: int
    is_last: bool
    report: StepReport
    learning_rate: float
    seconds: float
    data_seconds: float


class GoBack(Exception):
    """The run went wrong somewhere before this step; the message says how it shows. Handled by the loop."""


class Hook:
    """Something that happens around steps. Hooks run on every rank, in the order of the list."""

    def drops(self, sums: StepSums) -> bool:
        """Called before the update, with the step's losses; True drops it. Every rank must say the same."""
        return False

    def after_step(self, context: StepContext) -> None:
        """Called after every step; raises GoBack, on every rank, to undo it and what came before it."""

    def go_back(self, step: int) -> None:
        """Called once the run stands at the earlier `step` again: forget what came after it."""

    def save_now(self) -> str:
        """Called when the run must stop early; returns the checkpoint that resumes it, "" if this hook saves none."""
        return ""

    def finish(self) -> None:
        """Called when the run ends, also by an error."""
