"""One rank's place in the grids: coordinates and process groups per axis, passed as an argument, never global."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ernie5.errors import LayoutError
from ernie5.parallel.dims import AXES, GridDims
from ernie5.parallel.nodes import find_nodes


@dataclasses.dataclass
class Traffic:
    """Bytes that this rank sent to other ranks, by what they were; read by tests and by the observer.

    node_bytes: those of them, of all-to-alls, that went to ranks of other nodes.
    """

    sent_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    node_bytes: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, what: str, *, num_bytes: int, to_nodes: int = 0) -> None:
        """Count `num_bytes` that leave this rank, `to_nodes` of them its node."""
        self.sent_bytes[what] += num_bytes
        self.node_bytes[what] += to_nodes


@dataclasses.dataclass(frozen=True)
class Axis:
    """This rank's group along one axis. ranks: global ranks in order of coordinates; group: None for one rank; nodes:
    the node of each of them."""

    name: str
    ranks: tuple[int, ...]
    coordinate: int
    group: dist.ProcessGroup | None
    traffic: Traffic
    nodes: tuple[int, ...]

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)


@dataclasses.dataclass(frozen=True)
class ParallelState:
    """Both grids as one rank sees them."""

    dims: GridDims
    rank: int
    tp: Axis
    keys: Axis
    key_copies: Axis
    cp: Axis
    dp: Axis
    dp_cp: Axis
    pp: Axis
    stage: Axis
    model: Axis
    block: Axis
    ep: Axis
    etp: Axis
    edp: Axis
    world: Axis
    traffic: Traffic

    def axis(self, name: str) -> Axis:
        """The axis called `name`, for tables that hold names."""
        return vars(self)[name]

    def coordinates(self) -> str:
        """`rank 3 (pp0 dp1 cp0 tp1 | edp0 ep3 etp0)`, for messages."""
        places = {name: f"{name}{vars(self)[name].coordinate}" for name in AXES}
        attention = " ".join(places[name] for name in ("pp", "dp", "cp", "tp"))
        return f"rank {self.rank} ({attention} | " + " ".join(places[name] for name in ("edp", "ep", "etp")) + ")"


def build_state(dims: GridDims, *, node_size: int | None = None) -> ParallelState:
    """Create every group of every axis, in one fixed order on all ranks (lazily created groups can deadlock).

    Groups of one rank are not created, groups of the same ranks only once. Needs torch.distributed to be initialised
    unless the grid is one rank. node_size: ranks per node, None: as the launcher says (`find_nodes`); without ep nobody
    asks, and all ranks count as one node. Raises LayoutError where the grid is not that of the running processes.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if dims.world_size != world_size:
        raise LayoutError(f"the layout {dims.describe()} needs {dims.world_size} processes, and {world_size} run")
    traffic, nodes = Traffic(), find_nodes(node_size) if dims.ep > 1 else (0,) * world_size
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    if world_size > 1:
        made[tuple(range(world_size))] = dist.group.WORLD
    axes = {}
    for name in AXES:
        for ranks in dims.groups(name):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks))
            if rank in ranks:
                around = tuple(nodes[other] for other in ranks)
                axes[name] = Axis(name, ranks, ranks.index(rank), made.get(ranks), traffic, around)
    everyone = tuple(range(world_size))
    world = Axis("world", everyone, rank, made.get(everyone), traffic, nodes)
    return ParallelState(dims=dims, rank=rank, world=world, traffic=traffic, **axes)


def join_processes(device: torch.device) -> None:
    """Join the process group of the launcher (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or make a group of one.

    Without a launcher the store lives in memory, so that one process needs no port. SIGINT and SIGTERM end a rank that
    still waits for others.
    """
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        with signals_end_at_once():
            dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def signals_end_at_once() -> Iterator[None]:
    """SIGINT and SIGTERM end this process inside: for calls into torch that may wait half an hour, after which alone
    Python's handlers would run."""
    if threading.current_thread() is not threading.main_thread():  # others may not set handlers
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def real_group(axis: Axis, *, all_ranks: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
    """The axis's group, made now where it is one rank alone, for those who want an object. Collective."""
    if axis.group is not None:
        return axis.group
    made = {ranks: dist.new_group(list(ranks)) for ranks in all_ranks}
    return made[axis.ranks]
