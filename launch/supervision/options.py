"""The agent's command line."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from ernie5.config.arguments import CommandParser
from ernie5.errors import ConfigError

NODE_RANKS = ("NODE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
NODES = ("NODES", "SLURM_NNODES")


def number_from(names: tuple[str, ...], *, otherwise: int) -> int:
    """What the first of these variables says that whoever started this has set."""
    name = next((name for name in names if os.environ.get(name)), None)
    try:
        return otherwise if name is None else int(os.environ[name])
    except ValueError:
        raise ConfigError(f"{name} is {os.environ[name]!r} in the environment, and must be a number") from None


def parse(description: str) -> argparse.Namespace:
    """The options. Raises ConfigError for one that would be waited for in vain."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog="supervise.py", description=description, formatter_class=raw)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's directory, as in train.run_dir")
    parser.add_argument("--restarts", type=int, default=10, help="failed starts in a row without progress (10)")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds before the first restart (1)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="where the last step is kept (/dev/shm)")
    parser.add_argument("--node-rank", type=int, default=number_from(NODE_RANKS, otherwise=0),
                        help="number of this host (NODE_RANK, SLURM_NODEID or JOB_COMPLETION_INDEX, else 0)")
    parser.add_argument("--nodes", type=int, default=number_from(NODES, otherwise=1),
                        help="hosts of the run; agents of several keep each other's last step (NODES or SLURM_NNODES)")
    parser.add_argument("--address", help="where other agents reach this one (its address towards HEAD)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, what starts the ranks")
    told = parser.parse_args()
    # One host means that nobody said how many: there may be others all the same.
    last = told.nodes - 1 if told.nodes > 1 else math.inf
    for option, value, least, most in (("--nodes", told.nodes, 1, math.inf), ("--node-rank", told.node_rank, 0, last),
                                       ("--restarts", told.restarts, 0, math.inf), ("--delay", told.delay, 0, 1e6)):
        if not least <= value <= most:
            raise ConfigError(f"{option} is {value}, and must be at least {least}"
                              + (f" and at most {most:g}" if most < math.inf else ""))
    return told
