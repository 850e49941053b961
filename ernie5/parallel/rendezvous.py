"""Ranks meet under the launcher's variables, and whoever does not come, comes twice or was told otherwise is named."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import time

import torch
import torch.distributed as dist

from ernie5.errors import LayoutError, PeerError

MEET = "ernie5/meet"
VERDICT = f"{MEET}/verdict"
MET = "met"
POLL_SECONDS = 0.2
SPARE_SECONDS = 20.0  # the others wait longer than rank 0, whose verdict they wait for


@dataclasses.dataclass(frozen=True)
class Place:
    """What the launcher told one process."""

    rank: int
    world_size: int
    host: str


def meet(device: torch.device, *, seconds: float) -> None:
    """Join the process group once every rank has come; does nothing where one exists, or without a launcher.

    Raises PeerError naming the ranks that did not come within `seconds`, LayoutError for a rank that came twice or was
    told another number of processes: on every rank that did come.
    """
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    place = Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), socket.gethostname())
    store = _open_store(place, seconds=seconds)
    times = store.add(f"{MEET}/count/{place.rank}", 1)
    store.set(f"{MEET}/place/{place.rank}/{times}", json.dumps(dataclasses.asdict(place)))
    verdict = _judge(store, place=place, seconds=seconds) if place.rank == 0 else _await_verdict(store, place=place)
    if times > 1 and not verdict:
        verdict = f"LayoutError: {_twice(place.rank, names=[place.host])}, and the others went on without this one"
    store.add(f"{MEET}/left", 1)
    if verdict:
        _let_others_read(store, world_size=place.world_size, is_main=place.rank == 0)
        kind, _, message = verdict.partition(": ")
        raise (PeerError if kind == "PeerError" else LayoutError)(message)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("ernie5/group", store), rank=place.rank, world_size=place.world_size
    )


def _open_store(place: Place, *, seconds: float) -> dist.Store:
    """The store at MASTER_ADDR: rank 0 opens it, unless torchrun's agent has."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_open = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address, port, is_master=place.rank == 0 and not is_open, wait_for_workers=False,
            timeout=datetime.timedelta(seconds=seconds + SPARE_SECONDS),
        )
    except RuntimeError as error:
        if place.rank == 0:
            raise
        raise PeerError(
            f"{place.host} (rank {place.rank}) did not reach rank 0 at {address}:{port} within {seconds:g} s. Check "
            "that rank 0 runs, that the name resolves there, and the firewall between the hosts"
        ) from error
    if is_open:  # the agent's store outlives a start: its number keeps an earlier one's entries apart
        return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return store


def _judge(store: dist.Store, *, place: Place, seconds: float) -> str:
    """What is wrong, "" where nothing is; written down for the others."""
    deadline = time.monotonic() + seconds
    missing = list(range(1, place.world_size))
    while missing and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        missing = [rank for rank in missing if not store.check([f"{MEET}/place/{rank}/1"])]
    came = [place]
    for rank in range(place.world_size):
        if rank not in missing:
            for count in range(1, store.add(f"{MEET}/count/{rank}", 0) + 1):
                found = Place(**json.loads(store.get(f"{MEET}/place/{rank}/{count}")))
                came += [found] if rank or count > 1 else []
    verdict = _complaint(came, missing=missing, seconds=seconds)
    store.set(VERDICT, verdict or f"{MET} {place.world_size}")
    return verdict


def _complaint(came: list[Place], *, missing: list[int], seconds: float) -> str:
    hosts: dict[int, list[str]] = {}
    for place in came:
        hosts.setdefault(place.rank, []).append(place.host)
    for rank, names in hosts.items():
        if len(names) > 1:
            return f"LayoutError: {_twice(rank, names=names)}"
    told = [f"{place.host} (rank {place.rank}): {place.world_size}" for place in came
            if place.world_size != came[0].world_size]
    if told:
        first = f"rank 0 on {came[0].host} was told WORLD_SIZE={came[0].world_size}"
        return f"LayoutError: {first}, and {', '.join(told)}. Give every host the same list of hosts"
    if missing:
        present = ", ".join(f"{place.rank} on {place.host}" for place in came)
        return (f"PeerError: rank {', '.join(map(str, missing))} did not come within {seconds:g} s. There are: rank "
                f"{present}. Look at the hosts that are not among them")
    return ""


def _twice(rank: int, *, names: list[str]) -> str:
    return (f"rank {rank} came twice, from {' and '.join(names)}: each host needs its own node rank, each process its "
            "own RANK")


def _await_verdict(store: dist.Store, *, place: Place) -> str:
    try:
        verdict = store.get(VERDICT).decode()
    except RuntimeError as error:
        raise PeerError(f"rank 0 came and went before {place.host} (rank {place.rank}) was served") from error
    if verdict.startswith(MET) and int(verdict.removeprefix(MET)) != place.world_size:
        return (f"LayoutError: rank 0 was told WORLD_SIZE={verdict.removeprefix(MET).strip()}, and {place.host} (rank "
                f"{place.rank}): {place.world_size}. Give every host the same list of hosts")
    return "" if verdict.startswith(MET) else verdict


def _let_others_read(store: dist.Store, *, world_size: int, is_main: bool) -> None:
    """The store ends with rank 0: it stays a moment, until the others have read the verdict."""
    deadline = time.monotonic() + 2.0
    while is_main and time.monotonic() < deadline and store.add(f"{MEET}/left", 0) < world_size:
        time.sleep(POLL_SECONDS)
