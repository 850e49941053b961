"""What to do after a start has ended: a table from exit code to decision, and the bounds on starting again.

Only the standard library and the run's own names; nothing here starts or kills anything.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ernie5.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_ENVIRONMENT,
    EXIT_INTERRUPTED,
    EXIT_NUMERICS,
    EXIT_PEER,
    EXIT_USER,
)

EXIT_FILE = "exit.json"
METRICS_FILE = "metrics.jsonl"
LONGEST_DELAY_SECONDS = 60.0
ENVIRONMENT_FACTOR = 10.0  # a full disk or a lost network is not repaired within a second


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a start ended. code: of exit.json, else of the launcher; killed: nobody wrote exit.json; step: the farthest
    step in metrics.jsonl."""

    code: int
    killed: bool
    message: str
    step: int


@dataclasses.dataclass(frozen=True)
class Decision:
    """restart after delay_seconds, or end with `code`; reason: one line for the log."""

    restart: bool
    delay_seconds: float
    code: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """Starts in a row that may fail without the run getting any farther, by cause; delay of the first restart."""

    restarts: int = 10
    environment: int = 3
    bugs: int = 1
    delay_seconds: float = 1.0


class RestartPolicy:
    """Decides after each start; a start that got farther than all before it clears the counts."""

    def __init__(self, limits: Limits, *, step: int) -> None:
        self._limits, self._farthest, self._failures = limits, step, 0

    def decide(self, outcome: Outcome, *, stopping: bool) -> Decision:
        """What to do now; stopping: somebody asked the agent itself to end."""
        if outcome.step > self._farthest:
            self._farthest, self._failures = outcome.step, 0
        what = "killed (no exit.json)" if outcome.killed else f"exit {outcome.code}"
        if outcome.code == EXIT_DONE:
            return Decision(False, 0.0, EXIT_DONE, "done")
        if stopping:
            code = EXIT_INTERRUPTED if outcome.killed else outcome.code
            return Decision(False, 0.0, code, f"{what} after this agent was asked to stop")
        if outcome.code == EXIT_USER:
            return Decision(False, 0.0, outcome.code, f"{what}: a user's mistake stays one, {outcome.message}")
        if outcome.code == EXIT_NUMERICS:
            return Decision(False, 0.0, outcome.code, f"{what}: the run has used up its own retries, {outcome.message}")
        self._failures += 1
        allowed = self._allowed(outcome)
        if self._failures > allowed:
            reason = f"{what}: {self._failures} starts in a row failed at step {self._farthest}, at most {allowed} may"
            return Decision(False, 0.0, outcome.code, f"{reason}. {outcome.message}")
        factor = ENVIRONMENT_FACTOR if self._is(outcome, EXIT_ENVIRONMENT) else 1.0
        delay = min(LONGEST_DELAY_SECONDS, factor * self._limits.delay_seconds * 2 ** (self._failures - 1))
        reason = f"{what}: start {self._failures} of {allowed} without progress beyond step {self._farthest}"
        return Decision(True, delay, outcome.code, reason)

    def _allowed(self, outcome: Outcome) -> int:
        if self._is(outcome, EXIT_BUG):
            return self._limits.bugs
        return self._limits.environment if self._is(outcome, EXIT_ENVIRONMENT) else self._limits.restarts

    @staticmethod
    def _is(outcome: Outcome, code: int) -> bool:
        """A launcher's 1 without exit.json says nothing: torchrun and DeepSpeed end so after a killed child."""
        return outcome.code == code and not outcome.killed


def file_version(path: Path) -> tuple[int, int] | None:
    """Which file stands at `path`, for whoever wants to know whether it was written anew; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_outcome(run_dir: Path, *, launcher_code: int, known: tuple[int, int] | None = None) -> Outcome:
    """exit.json where there is one, for launchers blur codes; else killed, unless the command line was refused.

    known: the version of exit.json that is of an earlier start, as if there were none.
    """
    step = farthest_step(run_dir)
    try:
        if known is not None and file_version(run_dir / EXIT_FILE) == known:
            raise FileNotFoundError
        record = json.loads((run_dir / EXIT_FILE).read_text(encoding="utf-8"))
        return Outcome(int(record["exit_code"]), False, str(record["message"]), step)
    except (OSError, ValueError, KeyError, TypeError):
        refused = launcher_code == EXIT_USER
        code = EXIT_USER if refused else EXIT_PEER
        return Outcome(code, not refused, f"the launcher ended with {launcher_code}", step)


def farthest_step(run_dir: Path) -> int:
    """The last whole line of metrics.jsonl, 0 where there is none."""
    try:
        lines = (run_dir / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
