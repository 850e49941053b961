"""One of three ranks that meet and check each other again and again, made wrong on purpose, for test_preflight.py.

Writes one JSON object per case: what rank 0 printed, and the error of every rank.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ernie5.config.load import load_config
from ernie5.errors import Ernie5Error
from ernie5.parallel.rendezvous import meet
from ernie5.train.config import RootConfig
from ernie5.train.preflight import Preflight

RANK = int(os.environ["RANK"])
FOLDER = Path(os.environ["FOLDER"])
SIZE = 3
PATIENCE_SECONDS = 6.0  # on a busy machine, between processes that start together


def attempt(action: Callable[[], object]) -> str:
    try:
        action()
    except Ernie5Error as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return ""


def gather_at(name: str) -> None:
    """Wait until all three processes have come here."""
    (FOLDER / f"{name}-{RANK}").touch()
    while len(list(FOLDER.glob(f"{name}-*"))) < SIZE:
        time.sleep(0.01)


def meet_as(rank: int, *, world_size: int, port: str) -> str:
    """Come to `port` as the launcher of another start might have told this process."""
    gather_at(f"port-{port}")
    told = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_PORT": port}
    os.environ.update(told)
    return attempt(lambda: meet(torch.device("cpu"), seconds=PATIENCE_SECONDS))


def check(config: RootConfig, *, clock: Callable[[], float] = time.time) -> tuple[str, list[str]]:
    lines: list[str] = []
    return attempt(lambda: Preflight(config, clock=clock, say=lines.append).run()), lines


def main() -> None:
    faulthandler.dump_traceback_later(240.0, exit=True)  # a check that hangs says where
    socket.gethostname = lambda: f"node{RANK}"
    ports = os.environ["PORTS"].split()
    results: dict[str, object] = {}
    results["missing"] = meet_as(RANK, world_size=5, port=ports[0])
    results["twice"] = meet_as(min(RANK, 1), world_size=SIZE, port=ports[1])
    results["told"] = meet_as(RANK, world_size=4 if RANK == 1 else SIZE, port=ports[2])
    os.environ.update({"RANK": str(RANK), "WORLD_SIZE": str(SIZE), "MASTER_PORT": ports[3]})

    def settings(*overrides: str) -> RootConfig:
        fixed = ("train.run_dir=run", "engine.kind=grid", "parallel.ep=3", "model.moe.num_experts=9",
                 "batch.global_sequences=6", "data.streams=6", "batch.micro_sequences=1")
        return load_config(os.environ["CONFIG"], schema=RootConfig, overrides=(*fixed, *overrides))

    shared, own = FOLDER / "shared", FOLDER / f"own{RANK}"
    os.chdir(shared)
    results["sound"] = check(settings())
    results["settings"] = check(settings("train.seed=5") if RANK == 2 else settings())
    results["layout"] = attempt(lambda: Preflight(settings("parallel.tp=2", "model.kv_heads=2")).run())
    results["clock"] = check(settings(), clock=lambda: time.time() + (90.0 if RANK == 1 else 0.0))
    if RANK == 1:
        os.chdir(own)
    results["elsewhere"] = check(settings())
    os.chdir(shared)
    if RANK == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # no file may grow, for root neither
    results["unwritable"] = check(settings())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if RANK == 1:
        sys.path.insert(0, str(FOLDER / "older"))
    results["version"] = check(settings())
    dist.destroy_process_group()
    (FOLDER / f"rank{RANK}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
