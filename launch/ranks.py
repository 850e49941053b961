"""The ranks of one machine's CPU, started and waited for: spawn.py's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
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
