"""How fast the network between the ranks is, before a run depends on it: all-to-all per axis, and host to host."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ernie5.parallel.dims import AXES, GridDims

SMALL_BYTES = 8
LARGE_BYTES = 1 << 20
LINK_BYTES = 4 << 20
REPEATS = 5
WORLD = "world"


@dataclasses.dataclass(frozen=True)
class AxisSpeed:
    """All-to-all over the groups of an axis, all groups at a time, as its slowest group (`ranks`) saw it.

    latency_seconds: of 8 bytes per pair; bytes_per_second: what one rank sends to the others, at 1 MiB per pair.
    """

    axis: str
    ranks: tuple[int, ...]
    latency_seconds: float
    bytes_per_second: float


@dataclasses.dataclass(frozen=True)
class Link:
    """One direction between two ranks on different hosts; the clock runs from the first byte to the receipt."""

    sender: int
    receiver: int
    bytes_per_second: float


def measure_axes(dims: GridDims, *, device: torch.device) -> list[AxisSpeed]:
    """Every axis of more than one rank, and the whole world; axes with the same groups are one line. Collective."""
    everyone = (tuple(range(dims.world_size)),)
    layouts: dict[tuple[tuple[int, ...], ...], str] = {}
    for name, groups in [*((name, dims.groups(name)) for name in AXES), (WORLD, everyone)]:
        if len(groups[0]) > 1:
            layouts[groups] = f"{layouts[groups]} = {name}" if groups in layouts else name
    return [_measure_axis(name, groups=groups, device=device) for groups, name in layouts.items()]


def measure_links(leaders: Sequence[int], *, device: torch.device) -> list[Link]:
    """Both directions between neighbours in a ring of hosts, whose first ranks `leaders` are; pairs that share no host
    run at a time. Collective over all ranks."""
    found: list[Link] = []
    size = len(leaders)
    pairs = [(leaders[index], leaders[(index + 1) % size]) for index in range(size if size > 2 else size - 1)]
    odd_one = pairs[-1:] if len(pairs) % 2 and len(pairs) > 1 else []
    whole = pairs[: len(pairs) - len(odd_one)]
    for together in (whole[::2], whole[1::2], odd_one):
        for is_back in (False, True):
            own = None
            for pair in together:
                sender, receiver = pair[::-1] if is_back else pair
                if dist.get_rank() in pair:
                    own = _measure_link(sender, receiver=receiver, device=device)
            found += [link for link in _gather(own) if link is not None]
    return found


def _measure_axis(name: str, *, groups: Sequence[tuple[int, ...]], device: torch.device) -> AxisSpeed:
    rank, mine, members = dist.get_rank(), None, ()
    for ranks in groups:
        made = dist.group.WORLD if len(ranks) == dist.get_world_size() else dist.new_group(list(ranks))
        if rank in ranks:
            mine, members = made, ranks
    size = len(members)
    latency = statistics.median(_times(mine, size=size, num_bytes=SMALL_BYTES, device=device))
    seconds = min(_times(mine, size=size, num_bytes=LARGE_BYTES, device=device))
    if mine is not dist.group.WORLD:
        dist.destroy_process_group(mine)
    own = AxisSpeed(name, members, latency, LARGE_BYTES * (size - 1) / seconds)
    return min(_gather(own), key=lambda speed: speed.bytes_per_second)


def _times(group: dist.ProcessGroup, *, size: int, num_bytes: int, device: torch.device) -> list[float]:
    """Seconds of each repetition but the first, which makes the connections."""
    sent = torch.zeros(size * num_bytes, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    return [
        _clocked(lambda: dist.all_to_all_single(received, sent, group=group), device=device)
        for _ in range(REPEATS + 1)
    ][1:]


def _measure_link(sender: int, *, receiver: int, device: torch.device) -> Link | None:
    """The Link, on the sender; a byte comes back when all has arrived."""
    large = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=device)
    receipt = torch.zeros(1, dtype=torch.uint8, device=device)

    def send() -> None:
        dist.send(large, receiver)
        dist.recv(receipt, receiver)

    if dist.get_rank() == sender:
        return Link(sender, receiver, LINK_BYTES / min(_clocked(send, device=device) for _ in range(2)))
    for _ in range(2):
        dist.recv(large, sender)
        dist.send(receipt, sender)
    return None


def _clocked(action: Callable[[], object], *, device: torch.device) -> float:
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _gather(value: object) -> list:
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
