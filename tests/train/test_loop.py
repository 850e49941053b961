"""The loop itself: every hook is finished, and the first error is the one that is seen."""

from __future__ import annotations

import types

import pytest

from ernie5.errors import Interrupted
from ernie5.optim.config import OptimConfig
from ernie5.train.loop import Hook, LoopSettings, _interrupt, run_steps
from ernie5.train.recover import StopRequest
from ernie5.train.state import Progression


class Ending(Hook):
    """Counts its endings and fails on request."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.finished = error, 0

    def finish(self) -> None:
        """Count, then fail."""
        self.finished += 1
        if self.error is not None:
            raise self.error


class Saving(Ending):
    """Has a checkpoint to offer when the run must stop, or none."""

    def __init__(self, saved: str) -> None:
        super().__init__(None)
        self.saved = saved

    def save_now(self) -> str:
        """What was saved."""
        return self.saved


def test_an_interrupted_run_promises_to_go_on_only_from_what_was_saved() -> None:
    with pytest.raises(Interrupted, match=r"SIGTERM after step 3; saved runs/x/step-3\. The same command goes on from"):
        _interrupt([Ending(None), Saving("runs/x/step-3")], stop=types.SimpleNamespace(name="SIGTERM"), step=3)
    with pytest.raises(Interrupted, match=r"step 3; not saved: the next start is anew$"):
        _interrupt([Ending(None), Saving("")], stop=types.SimpleNamespace(name="SIGTERM"), step=3)


@pytest.mark.parametrize("steps", [0, 1])
def test_every_hook_is_finished_and_the_first_error_is_raised(steps: int) -> None:
    hooks = [Ending(OSError("disk")), Ending(ValueError("later")), Ending(None)]
    engine = types.SimpleNamespace(is_main=False)  # with a step to do, it fails for want of everything else
    with pytest.raises(OSError if steps == 0 else AttributeError):
        run_steps(
            engine, data=None, progression=Progression(), hooks=hooks, stop=StopRequest(),
            settings=LoopSettings(steps=steps, optim=OptimConfig()),
        )
    assert [hook.finished for hook in hooks] == [1, 1, 1]
