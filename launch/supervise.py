"""Start a training, and start it again when it ends before it is done: one agent per host, around any launcher.

    python launch/supervise.py --run-dir runs/mine -- python launch/spawn.py 4 CONFIG train.run_dir=runs/mine
    python launch/supervise.py --run-dir runs/mine -- deepspeed launch/pretrain.py CONFIG train.run_dir=runs/mine

On several hosts, one on each, around that host's share of the launcher, all with the same RUN_DIR on shared storage:

    NODES=2 NODE_RANK=1 HEAD=node0 python launch/supervise.py --run-dir runs/mine -- bash launch/torchrun.sh CONFIG ...

It trusts RUN_DIR/exit.json, which every run writes, more than the launcher's exit code; a missing one means killed.
0 ends; 2 and 4 end (a user's mistake, or numerics beyond the run's own retries); 75, 5 and kills start again; 3 (disk,
memory, network) a few times with longer pauses; 1 (a bug) once. Pauses double while a run gets no farther, and the
number of such starts is bounded. Before each start, ranks that an earlier one left behind are killed; --fresh and
--resume count until a start with them has begun. SIGINT and SIGTERM go to the launcher and end the agent as well. The
state after the last step is kept in shared memory, where the next start finds it, and of several hosts (--nodes) also
in that of the next host. RUN_DIR/supervise.jsonl keeps one line per start (supervise-node1.jsonl of the second host,
and so on).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from pathlib import Path

from supervision.agent import Agent, Host
from supervision.policy import Limits

NODE_RANKS = ("NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
NODES = ("NODES", "SLURM_NNODES")


def number_from(names: tuple[str, ...], *, otherwise: int) -> int:
    """What the first of these variables says that whoever started this has set."""
    return int(next((os.environ[name] for name in names if name in os.environ), otherwise))


def in_home(text: str) -> Path:
    """A path whose leading `~`, which no shell expands in --run-dir=~/mine, is the home folder."""
    return Path(os.path.expanduser(text))


def main() -> int:
    """Parse, lock the run directory against a second agent, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=in_home, required=True, help="the run's directory, as in train.run_dir")
    parser.add_argument("--restarts", type=int, default=10, help="failed starts in a row without progress (10)")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds before the first restart (1)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="where the last step is kept (/dev/shm)")
    parser.add_argument("--node-rank", type=int, default=number_from(NODE_RANKS, otherwise=0),
                        help="number of this host (NODE_RANK, SLURM_NODEID or JOB_COMPLETION_INDEX, else 0)")
    parser.add_argument("--nodes", type=int, default=number_from(NODES, otherwise=1),
                        help="hosts of the run; agents of several keep each other's last step (NODES or SLURM_NNODES)")
    parser.add_argument("--address", help="where other agents reach this one (its address towards HEAD)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, what starts the ranks")
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    of_host = f"-node{arguments.node_rank}" if arguments.node_rank else ""
    with (arguments.run_dir / f".supervise{of_host}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"ConfigError: another agent supervises {arguments.run_dir} as node {arguments.node_rank}. End it "
                  "first, or give every host its own --node-rank", file=sys.stderr)
            return 2
        host = Host(arguments.node_rank, arguments.nodes, arguments.address)
        agent = Agent(arguments.command, run_dir=arguments.run_dir, memory=arguments.memory, host=host)
        return agent.run(Limits(restarts=arguments.restarts, delay_seconds=arguments.delay))


if __name__ == "__main__":
    sys.exit(main())
