"""Kill random ranks of a supervised run at random moments, and compare what comes out with the uninterrupted run:

    python tools/chaos/main.py --kills 50 --processes 4 --out runs/chaos

Moments: while a rank starts or loads, in the middle of steps, while a checkpoint is written. Each kill is a SIGKILL of
one rank; launch/supervise.py brings the run back. A run that ends before all kills are spent is followed by another one
(round), and each is compared with the uninterrupted one figure by figure. Ends with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_peers"))

from arguments import at_least, folder
from compare import compare
from ranks import MARK, find_ranks, is_saving, last_step, resumed_steps, saved_step

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = ("load", "step", "save")
POLL_SECONDS = 0.01
PATIENCE_SECONDS = 1800.0


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL: round, moment, rank; the last step of metrics.jsonl, the newest checkpoint on disk, how many starts
    of the run had loaded one so far, and how many had ended."""

    round: int
    moment: str
    rank: int
    step: int
    saved_step: int
    loads: int
    starts: int


@dataclasses.dataclass(frozen=True)
class Round:
    """One run under fire: kills spent, seconds, steps done twice, loads of an older checkpoint than the newest, and how
    it differs from the uninterrupted run."""

    kills: int
    seconds: float
    steps_lost: int
    checkpoints_lost: int
    divergence: float
    final_loss: float
    final_loss_whole: float


class Attack:
    """A supervised run in `run_dir` and the kills that it suffers."""

    def __init__(self, run_dir: Path, *, number: int, options: argparse.Namespace) -> None:
        self._run_dir, self._number, self._options = run_dir, number, options
        self._random = random.Random(f"{options.seed} {number}")
        self._mark = f"{os.getpid()}-{number}"
        self.kills: list[Kill] = []

    def run(self, budget: int) -> Round:
        """Spend at most `budget` kills on one run and compare it. Raises RuntimeError if the run does not end well."""
        shutil.rmtree(self._run_dir, ignore_errors=True)
        self._run_dir.mkdir(parents=True)
        command = [sys.executable, str(ROOT / "launch" / "supervise.py"), "--run-dir", str(self._run_dir), "--delay",
                   "0.1", "--restarts", "30", "--", *spawn_command(self._options, run_dir=self._run_dir)]
        started = time.monotonic()
        with (self._run_dir / "agent.log").open("wb") as log:
            environment = {**os.environ, MARK.decode(): self._mark}
            agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                while agent.poll() is None and len(self.kills) < budget:
                    self._strike(agent)
                code = agent.wait(timeout=PATIENCE_SECONDS)
            finally:
                if agent.poll() is None:
                    agent.terminate()
        if code != 0:
            raise RuntimeError(f"the run ended with {code}; see {self._run_dir}/agent.log and exit.json")
        return self._judge(time.monotonic() - started)

    def _strike(self, agent: subprocess.Popen) -> None:
        """Wait for the next start, then for a random moment of it, and kill a random rank."""
        starts, moment = self._num_ends(), self._random.choice(MOMENTS)
        ranks = self._wait_for(agent, lambda: self._whole_group(), starts=starts)
        before = last_step(self._run_dir)
        if moment == "load":
            time.sleep(self._random.uniform(0.0, self._options.load_seconds))
        else:
            self._wait_for(agent, lambda: last_step(self._run_dir) not in (before, 0), starts=starts)
            if moment == "save":
                self._wait_for(agent, lambda: is_saving(self._run_dir), starts=starts)
                time.sleep(self._random.uniform(0.0, 0.1))
            else:
                time.sleep(self._random.uniform(0.0, self._options.step_seconds))
        if not ranks or agent.poll() is not None or self._num_ends() != starts:
            return
        rank = self._random.choice(sorted(ranks))
        saved, loads = saved_step(self._run_dir), len(resumed_steps(self._run_dir))
        kill = Kill(self._number, moment, rank, last_step(self._run_dir), saved, loads, starts)
        try:
            os.kill(ranks[rank], signal.SIGKILL)
        except ProcessLookupError:
            return
        self.kills.append(kill)
        print(json.dumps(dataclasses.asdict(kill)), flush=True)
        self._wait_for(agent, lambda: self._num_ends() > starts, starts=None)

    def _whole_group(self) -> dict[int, int]:
        ranks = find_ranks(self._mark)
        return ranks if len(ranks) == self._options.processes else {}

    def _num_ends(self) -> int:
        path = self._run_dir / "supervise.jsonl"
        return len(path.read_text("utf-8").splitlines()) if path.exists() else 0

    def _wait_for(self, agent: subprocess.Popen, condition: object, *, starts: int | None) -> object:
        """The first true value of `condition`; None once the agent, or the start number `starts`, has ended."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while agent.poll() is None and (starts is None or self._num_ends() == starts):
            if found := condition():
                return found
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing happened for {PATIENCE_SECONDS:.0f} s in {self._run_dir}")
            time.sleep(POLL_SECONDS)
        return None

    def _judge(self, seconds: float) -> Round:
        found = compare(self._run_dir, whole=self._options.out / "whole")
        resumed = resumed_steps(self._run_dir)
        # A rank killed in the last start was done with its work: nothing is loaded behind it, and nothing was lost. Two
        # kills without a load in between find the same steps undone: the second one alone counts.
        ends = self._num_ends()
        last = list({kill.loads: kill for kill in self.kills if kill.starts + 1 < ends}.values())
        reached = [resumed[kill.loads] if kill.loads < len(resumed) else 0 for kill in last]
        lost = sum(max(0, kill.step - step) for kill, step in zip(last, reached, strict=True))
        missing = sum(step < kill.saved_step for kill, step in zip(last, reached, strict=True))
        return Round(
            len(self.kills), seconds, lost, missing, found.divergence, found.final_loss, found.final_loss_whole
        )


def spawn_command(options: argparse.Namespace, *, run_dir: Path) -> list[str]:
    """The launcher's command line for this run directory."""
    return [sys.executable, str(ROOT / "launch" / "spawn.py"), str(options.processes), str(options.config),
            f"train.run_dir={run_dir}", *options.overrides]


def main() -> int:
    """Run the yardstick, then rounds until the kills are spent; print and write the report."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "whole" / "exit.json").exists():
        subprocess.run(spawn_command(options, run_dir=options.out / "whole"), check=True)
    kills: list[Kill] = []
    rounds: list[Round] = []
    while len(kills) < options.kills:
        attack = Attack(options.out / f"round-{len(rounds)}", number=len(rounds), options=options)
        rounds.append(attack.run(options.kills - len(kills)))
        kills += attack.kills
        print(f"round {len(rounds) - 1}: {rounds[-1]}", flush=True)
    report = {
        "kills_survived": len(kills),
        "by_moment": {moment: sum(kill.moment == moment for kill in kills) for moment in MOMENTS},
        "steps_lost": sum(found.steps_lost for found in rounds),
        "checkpoints_lost": sum(found.checkpoints_lost for found in rounds),
        "divergence": max(found.divergence for found in rounds),
        "rounds": [dataclasses.asdict(found) for found in rounds],
        "kills": [dataclasses.asdict(kill) for kill in kills],
    }
    (options.out / "chaos.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name in ("kills_survived", "by_moment", "steps_lost", "checkpoints_lost", "divergence"):
        print(f"{name:18} {report[name]}")
    return int(bool(report["checkpoints_lost"] or report["divergence"]))


def parse() -> argparse.Namespace:
    """The command line; `a.b=c` at the end are settings of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=at_least(1), default=50)
    parser.add_argument("--processes", type=at_least(1), default=4)
    parser.add_argument("--out", type=folder, required=True, help="folder for all runs and chaos.json")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("chaos.yaml"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load-seconds", type=float, default=20.0, help="kills while loading fall within this time")
    parser.add_argument("--step-seconds", type=float, default=3.0, help="kills in steps: time after a start's first")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
