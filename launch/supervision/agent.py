"""The agent of one host: starts the command, waits, decides, starts again; owns the replica of the last step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from supervision.endings import Ending, Endings
from supervision.launches import Launches
from supervision.neighbours import NEIGHBOURS_VARIABLE, Neighbours, own_address
from supervision.policy import EXIT_FILE, Limits, Outcome, RestartPolicy, farthest_step, file_version, read_outcome
from supervision.processes import MARK, kill_strays, mark_of

from ernie5.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError
from ernie5.observe.faults import classify
from ernie5.train.recover import RUN_DIR_VARIABLE

CONFIG_FILE = "config.yaml"
POLL_SECONDS = 0.05
RECORD_SECONDS = 10.0  # until exit.json, where another host has rank 0
LAST_SAVE_SECONDS = 300.0
LAUNCHERS_SECONDS = 120.0  # until other hosts notice that this one was lost; then it starts all the same
LOOK_SECONDS, LEAVE_SECONDS = 0.5, 5.0  # between looks at other agents; for a launcher to end its ranks
REPLICA_VARIABLE = "ERNIE5_REPLICA"  # ernie5/train/replica.py reads it; importing that would load torch


def going_on(command: list[str]) -> list[str]:
    """The command once a start has begun: --fresh and --resume CKPT would undo what was done since."""
    kept, words = [], iter(command)
    for word in words:
        if word == "--resume":
            next(words, None)
        elif word != "--fresh" and not word.startswith("--resume="):
            kept.append(word)
    return kept


@dataclasses.dataclass(frozen=True)
class Host:
    """Which of `nodes` hosts this is, and the address under which the others reach it (None: find it out)."""

    node_rank: int = 0
    nodes: int = 1
    address: str | None = None


class Agent:
    """Runs the command until it is done, may not be started again, or a signal arrives."""

    def __init__(self, command: list[str], *, run_dir: Path, memory: Path, host: Host) -> None:
        self._command, self._run_dir, self._host, self._node_rank = command, run_dir, host, host.node_rank
        self._mark = mark_of(run_dir, node_rank=host.node_rank)
        self._replica, self._copies = memory / f"ernie5-{self._mark}", memory / f"ernie5-{self._mark}-copies"
        self._environment = {
            MARK: self._mark, REPLICA_VARIABLE: str(self._replica), RUN_DIR_VARIABLE: str(run_dir.absolute())
        }
        self._child: subprocess.Popen | None = None
        self._stopping = False
        self._endings = Endings(run_dir, node_rank=host.node_rank, nodes=host.nodes)
        self._launches = Launches(run_dir, node_rank=host.node_rank, nodes=host.nodes)
        self._looked, self._lost = 0.0, None

    def run(self, limits: Limits) -> int:
        """Returns the exit code of the run. The replica of an earlier agent may be of another history: it goes. What
        comes in its place is what the neighbour's agent, which has lived on, keeps of this host."""
        if self._host.nodes > 1:
            kill_strays(self._mark)  # ranks of an earlier agent could still write into the replica
        shutil.rmtree(self._replica, ignore_errors=True)
        neighbours = self._meet_neighbours() if self._host.nodes > 1 else None
        try:
            return self._run(limits)
        except Exception as error:
            fault = classify(error)
            self._endings.leave(code=fault.exit_code, reason=repr(error) if fault.is_bug else fault.line())
            raise
        finally:
            if neighbours is not None:
                neighbours.stop()
            shutil.rmtree(self._replica, ignore_errors=True)

    def _meet_neighbours(self) -> Neighbours:
        head = os.environ.get("HEAD") or os.environ.get("MASTER_ADDR") or socket.gethostname()
        found = Neighbours(
            self._run_dir, folder=self._replica, copies=self._copies, node_rank=self._node_rank, nodes=self._host.nodes,
            address=self._host.address or own_address(head),
        )
        found.start(restore=self._command == going_on(self._command))
        self._environment[NEIGHBOURS_VARIABLE] = str(self._host.nodes)
        return found

    def _run(self, limits: Limits) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward)
        policy = RestartPolicy(limits, step=farthest_step(self._run_dir))
        self._await_launchers()
        record = self._run_dir / EXIT_FILE
        known = file_version(record)  # of an earlier start: node 0 may be slower to remove it than this host to fail
        while not self._stopping:
            strays = kill_strays(self._mark)
            if self._node_rank == 0:  # rank 0's host
                record.unlink(missing_ok=True)
            before = file_version(self._run_dir / CONFIG_FILE)
            with self._launches.running():
                launcher_code = self._start_and_wait()
            if self._node_rank:
                self._await_record(launcher_code, known=known)
            if self._lost is not None:
                return self._follow(self._lost, strays=strays)
            outcome = read_outcome(self._run_dir, launcher_code=launcher_code, known=known)
            known = file_version(record)
            if self._command != going_on(self._command) and self._has_begun(outcome, before=before):
                self._command = going_on(self._command)
                policy = RestartPolicy(limits, step=0)  # the steps so far were those of the run before
            decision = policy.decide(outcome, stopping=self._stopping)
            self._note(code=outcome.code, killed=outcome.killed, step=outcome.step, strays=strays,
                       restart=decision.restart, reason=decision.reason)
            if not decision.restart:
                kill_strays(self._mark)
                if decision.code != EXIT_DONE and not self._stopping:
                    self._endings.leave(code=decision.code, reason=decision.reason)
                return decision.code
            until = time.monotonic() + decision.delay_seconds
            while time.monotonic() < until and not self._stopping and not self._is_left():
                time.sleep(POLL_SECONDS)
            if self._lost is not None:
                return self._follow(self._lost, strays=[])
        return EXIT_INTERRUPTED

    def _has_begun(self, outcome: Outcome, *, before: tuple[int, int] | None) -> bool:
        """Whether --fresh or --resume has been carried out: a start writes config.yaml anew once nothing is left that
        could refuse it. So it counts too where nobody knows: after a kill, and of several hosts, whose agents must all
        say the same."""
        return outcome.killed or self._host.nodes > 1 or file_version(self._run_dir / CONFIG_FILE) != before

    def _await_launchers(self) -> None:
        """Where the agent before this one was killed: until the other hosts' launchers of that time have ended."""
        deadline, told = time.monotonic() + LAUNCHERS_SECONDS, False
        while (remaining := self._launches.remain()) and time.monotonic() < deadline and not self._stopping:
            if not told:
                told = True
                print(f"supervise: waits for launchers that lost this host to end: {', '.join(remaining)}",
                      file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)

    def _is_left(self) -> bool:
        """Whether another agent has given up, without which the run cannot go on."""
        if self._lost is None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked, self._lost = time.monotonic(), self._endings.seen()
        return self._lost is not None

    def _follow(self, lost: Ending, *, strays: list[int]) -> int:
        """End as the agent that gave up did."""
        strays = [*strays, *kill_strays(self._mark)]
        self._note(code=lost.code, killed=False, step=farthest_step(self._run_dir), strays=strays, restart=False,
                   reason=f"{lost}. No run without that host")
        return lost.code

    def _start_and_wait(self) -> int:
        environment = {**os.environ, **self._environment}
        try:
            self._child = subprocess.Popen(self._command, env=environment, start_new_session=True)
        except OSError as error:
            raise ConfigError(
                f"{self._command[0]!r} does not start: {error.strerror}. After --, name a program of this host's PATH, "
                "or an executable file"
            ) from error
        if self._stopping:  # asked while there was no child to pass it on to
            self._child.terminate()
        while self._child.poll() is None:
            if self._is_left():
                self._child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._child.wait(LEAVE_SECONDS)
                kill_strays(self._mark)
                return self._child.wait()
            time.sleep(POLL_SECONDS)
        return self._child.returncode

    def _await_record(self, launcher_code: int, *, known: tuple[int, int] | None) -> None:
        """The other hosts may still be about to say why the run ended, or to write its last checkpoint."""
        deadline = time.monotonic() + (LAST_SAVE_SECONDS if launcher_code == 0 else RECORD_SECONDS)
        while time.monotonic() < deadline and file_version(self._run_dir / EXIT_FILE) in (None, known):
            if self._stopping or self._is_left():
                return
            time.sleep(POLL_SECONDS)

    def _forward(self, number: int, _frame: object) -> None:
        self._stopping = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _note(self, **fields: object) -> None:
        print(f"supervise: {fields['reason']}; {'starting again' if fields['restart'] else 'ending'}",
              file=sys.stderr, flush=True)
        name = f"supervise-node{self._node_rank}.jsonl" if self._node_rank else "supervise.jsonl"
        with (self._run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"unix_seconds": time.time(), **fields}) + "\n")
