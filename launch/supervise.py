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
import sys

from supervision.agent import Agent, Host
from supervision.options import parse
from supervision.policy import Limits

from ernie5.errors import ConfigError, EnvironmentFault
from ernie5.observe.faults import classify, refusal_of


def supervise(arguments: argparse.Namespace) -> int:
    """Lock the run directory against a second agent, run. Raises ConfigError or EnvironmentFault."""
    of_host = f"-node{arguments.node_rank}" if arguments.node_rank else ""
    try:
        arguments.run_dir.mkdir(parents=True, exist_ok=True)
        lock = (arguments.run_dir / f".supervise{of_host}.lock").open("w")
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(
            f"--run-dir {arguments.run_dir}: a file stands in its place. Name another directory") from None
    except OSError as error:
        refusal = refusal_of(error, place="--run-dir runs/mine")
        raise EnvironmentFault(f"--run-dir {arguments.run_dir}: {refusal}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another agent supervises {arguments.run_dir} as node {arguments.node_rank}. End it "
                              "first, or give every host its own --node-rank") from None
        host = Host(arguments.node_rank, arguments.nodes, arguments.address)
        agent = Agent(arguments.command, run_dir=arguments.run_dir, memory=arguments.memory, host=host)
        return agent.run(Limits(restarts=arguments.restarts, delay_seconds=arguments.delay))


def main() -> int:
    """Run; a mistake or a fault of the machine is one line and its exit code."""
    try:
        return supervise(parse(__doc__))
    except Exception as error:
        fault = classify(error)
        if fault.is_bug:
            raise
        print(fault.line(), file=sys.stderr)
        return fault.exit_code


if __name__ == "__main__":
    sys.exit(main())
