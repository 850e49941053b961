"""Start N training processes on this machine's CPU and end as they do: `python launch/spawn.py N CONFIG [a.b=c ...]`.

Launchers blur exit codes and print a traceback of their own for a user's typing mistake. Here only rank 0 speaks (the
other ranks write to LOGS/rank-K.log, shown if one of them dies alone), a signal reaches every rank once, and the exit
code is the run's own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRACE_SECONDS = 30.0
POLL_SECONDS = 0.05
TAIL_LINES = 5
LOST_PEER = 5  # exit code of a rank that noticed another one's end
REFUSED = 2  # of a rank that cannot run on its user's settings or data: there is nothing to wait for
REFUSED_SECONDS = 1.0


def start(num_processes: int, *, arguments: list[str], logs: Path) -> list[subprocess.Popen]:
    """Start the ranks, one thread each; their own sessions keep Ctrl-C of the terminal from reaching them twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1), "DS_ACCELERATOR": "cpu"}
    ranks = []
    for rank in range(num_processes):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, str(Path(__file__).with_name("pretrain.py")), *arguments]
        if rank == 0:
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
            continue
        with (logs / f"rank-{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log))
    return ranks


def wait(ranks: list[subprocess.Popen], *, logs: Path) -> int:
    """Wait for all; once one has failed the others get a grace period. Returns the exit code of the run."""
    deadline, stuck = None, []
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and any(rank.poll() for rank in ranks):
            refused = any(rank.poll() == REFUSED for rank in ranks)
            deadline = time.monotonic() + (REFUSED_SECONDS if refused else GRACE_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            stuck += [rank for rank in ranks if rank.poll() is None and rank not in stuck]
            for rank in stuck:
                rank.kill()
        time.sleep(POLL_SECONDS)
    for index, rank in enumerate(ranks):
        if rank.returncode < 0 and rank not in stuck:
            number = -rank.returncode
            print(f"rank {index} was killed by signal {number} ({signal.strsignal(number)})", file=sys.stderr)
    if ranks[0].returncode < 0 or ranks[0].returncode in (0, LOST_PEER):
        for index, rank in enumerate(ranks[1:], start=1):
            if rank.returncode > 0 and rank.returncode != LOST_PEER:
                lines = (logs / f"rank-{index}.log").read_text(encoding="utf-8", errors="replace").splitlines()
                print("\n".join(f"rank {index}: {line}" for line in lines[-TAIL_LINES:]), file=sys.stderr)
    codes = sorted((rank.returncode for rank in ranks if rank.returncode > 0), key=lambda code: code == LOST_PEER)
    killed = [128 - rank.returncode for rank in ranks if rank.returncode < 0]
    return next(iter(codes + killed), 0)


def main() -> int:
    """Run the ranks; forward SIGINT and SIGTERM to each as they come."""
    if len(sys.argv) < 3 or not sys.argv[1].isdigit() or int(sys.argv[1]) < 1:
        print(f"ConfigError: {' '.join(sys.argv[1:])!r}: expected a number of processes and a CONFIG. "
              "Example: python launch/spawn.py 2 configs/pretrain/quickstart.yaml", file=sys.stderr)
        return 2
    logs = Path(os.environ.get("RANK_LOGS") or tempfile.mkdtemp(prefix="ernie5-ranks-"))
    logs.mkdir(parents=True, exist_ok=True)
    ranks: list[subprocess.Popen] = []
    early: list[int] = []

    def forward(number: int, _frame: object) -> None:
        if not ranks:
            early.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    ranks += start(int(sys.argv[1]), arguments=sys.argv[2:], logs=logs)
    for number in early:
        forward(number, None)
    return wait(ranks, logs=logs)


if __name__ == "__main__":
    sys.exit(main())
