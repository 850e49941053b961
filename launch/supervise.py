"""Start a training, and start it again when it ends before it is done: one agent per host, around any launcher.

    python launch/supervise.py --run-dir runs/mine -- python launch/spawn.py 4 CONFIG train.run_dir=runs/mine
    python launch/supervise.py --run-dir runs/mine -- deepspeed launch/pretrain.py CONFIG train.run_dir=runs/mine

It trusts RUN_DIR/exit.json, which every run writes, more than the launcher's exit code; a missing one means killed.
0 ends; 2 and 4 end (a user's mistake, or numerics beyond the run's own retries); 75, 5 and kills start again; 3 (disk,
memory, network) a few times with longer pauses; 1 (a bug) once. Pauses double while a run gets no farther, and the
number of such starts is bounded. Before each start, ranks that an earlier one left behind are killed. SIGINT and
SIGTERM go to the launcher and end the agent as well. RUN_DIR/supervise.jsonl keeps one line per start.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ernie5.errors import EXIT_INTERRUPTED
from supervision.policy import EXIT_FILE, Limits, RestartPolicy, farthest_step, read_outcome
from supervision.processes import MARK, kill_strays, mark_of

POLL_SECONDS = 0.05


class Agent:
    """Runs the command until it is done, may not be started again, or a signal arrives."""

    def __init__(self, command: list[str], *, run_dir: Path) -> None:
        self._command, self._run_dir, self._mark = command, run_dir, mark_of(run_dir)
        self._child: subprocess.Popen | None = None
        self._stopping = False

    def run(self, limits: Limits) -> int:
        """Returns the exit code of the run."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward)
        policy = RestartPolicy(limits, step=farthest_step(self._run_dir))
        while not self._stopping:
            strays = kill_strays(self._mark)
            (self._run_dir / EXIT_FILE).unlink(missing_ok=True)
            outcome = read_outcome(self._run_dir, launcher_code=self._start_and_wait())
            decision = policy.decide(outcome, stopping=self._stopping)
            self._note(code=outcome.code, killed=outcome.killed, step=outcome.step, strays=strays,
                       restart=decision.restart, reason=decision.reason)
            if not decision.restart:
                kill_strays(self._mark)
                return decision.code
            until = time.monotonic() + decision.delay_seconds
            while time.monotonic() < until and not self._stopping:
                time.sleep(POLL_SECONDS)
        return EXIT_INTERRUPTED

    def _start_and_wait(self) -> int:
        environment = {**os.environ, MARK: self._mark}
        self._child = subprocess.Popen(self._command, env=environment, start_new_session=True)
        return self._child.wait()

    def _forward(self, number: int, _frame: object) -> None:
        self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _note(self, **fields: object) -> None:
        print(f"supervise: {fields['reason']}; {'starting again' if fields['restart'] else 'ending'}",
              file=sys.stderr, flush=True)
        with (self._run_dir / "supervise.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unix_seconds": time.time(), **fields}) + "\n")


def main() -> int:
    """Parse, lock the run directory against a second agent, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's directory, as in train.run_dir")
    parser.add_argument("--restarts", type=int, default=10, help="failed starts in a row without progress (10)")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds before the first restart (1)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, what starts the ranks")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    with (arguments.run_dir / ".supervise.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"ConfigError: another agent supervises {arguments.run_dir}. End it first", file=sys.stderr)
            return 2
        agent = Agent(arguments.command, run_dir=arguments.run_dir)
        return agent.run(Limits(restarts=arguments.restarts, delay_seconds=arguments.delay))


if __name__ == "__main__":
    sys.exit(main())
