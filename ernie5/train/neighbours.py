"""The replica of a run on several hosts: every host keeps the part of its own ranks, self-contained, in its memory.

The agents (launch/supervise.py) bring a copy of each part to the neighbour host in the background, and bring it back to
a host that lost its memory. Ranks go on from a step that all hosts have the parts of, in one history and one layout.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from pathlib import Path

from ernie5.checkpoint.load import LoadedRun, open_run
from ernie5.checkpoint.manifest import read_manifest
from ernie5.checkpoint.names import list_checkpoints, step_name, step_of
from ernie5.checkpoint.save import Contents
from ernie5.checkpoint.verify import find_damage
from ernie5.engine.interface import KINDS, Engine, StateSlice
from ernie5.errors import CheckpointError
from ernie5.observe.log import get_log
from ernie5.parallel.boxes import Box

NEIGHBOURS_VARIABLE = "ERNIE5_NEIGHBOURS"  # set by agents that carry copies to each other
CARRIED_FILE = ".carried"


class HostRanks:
    """The ranks of one host, which share the replica's `folder`, as the Saver needs them; collective."""

    def __init__(self, engine: Engine, *, folder: Path) -> None:
        place = f"{socket.gethostname()} {folder}"  # agents of two hosts may be tried on one
        places = [found["place"] for found in engine.gather({"place": place})]
        self._engine, self._mates = engine, [rank for rank, other in enumerate(places) if other == place]
        self.num_hosts, self.rank, self.ranks = len(set(places)), self._mates.index(engine.rank), len(self._mates)
        self._mine: set[tuple[str, Box]] | None = None

    @property
    def is_main(self) -> bool:
        """True on the first rank of the host, which publishes its part."""
        return self.rank == 0

    def gather(self, value: dict) -> list[dict]:
        """The values of this host's ranks; collective over all hosts."""
        found = self._engine.gather(value)
        return [found[rank] for rank in self._mates]

    def total(self, number: float) -> float:
        """The sum over the ranks of all hosts; collective."""
        return self._engine.total(number)

    def part(self, contents: Contents) -> Contents:
        """What this rank writes of its host's part: each box that ranks of the host hold is written by one of them, so
        that the host needs no other one to read its state back. Collective."""
        name = self._engine.gather({"name": f"{contents.run.step}-{os.getpid()}-{time.time_ns():x}"})[0]["name"]
        if self._mine is None:
            self._mine = self._share(contents.slices)
        slices = tuple(
            dataclasses.replace(piece, is_written=(piece.key, piece.box) in self._mine) for piece in contents.slices
        )
        return dataclasses.replace(contents, slices=slices, rank=self.rank, ranks=self.ranks, part_of=name)

    def _share(self, slices: tuple[StateSlice, ...]) -> set[tuple[str, Box]]:
        """The largest boxes first, each to that one of its holders that has the fewest elements so far."""
        own = [(piece.key, piece.box) for piece in slices]
        holders: dict[tuple[str, Box], list[int]] = {}
        for rank, found in enumerate(self.gather({"held": own})):
            for item in found["held"]:
                holders.setdefault(item, []).append(rank)
        loads, mine = [0] * self.ranks, set()
        for item in sorted(holders, key=lambda item: (-item[1].numel, item[0], item[1].start)):
            chosen = min(holders[item], key=lambda rank: loads[rank])
            loads[chosen] += item[1].numel
            if chosen == self.rank:
                mine.add(item)
        return mine


def is_carried(folder: Path, *, part_of: str) -> bool:
    """Whether the agent is done with this host's part of a save: the neighbour has it, or could not be reached."""
    try:
        return (folder / CARRIED_FILE).read_text(encoding="utf-8").strip() == part_of
    except FileNotFoundError:
        return False


def find_common(folder: Path | None, *, disk_step: int, engine: Engine) -> LoadedRun | None:
    """This host's part of the newest step, farther than `disk_step`, that all hosts hold parts of, sound and in the
    present layout; None on every rank where there is no such step. Collective."""
    own = _steps(folder)
    everyone = [set(found["parts"]) for found in engine.gather({"parts": sorted(own)})]
    common = set.intersection(*everyone)
    if not common or folder is None or max(common)[0] <= disk_step:
        return None
    step, _ = max(common)
    hosts = HostRanks(engine, folder=folder)
    loaded, problem = None, ""
    try:
        loaded = open_run(folder / step_name(step), may_be_part=True)
        damage = find_damage(loaded.directory, manifest=loaded.manifest, share=(hosts.rank, hosts.ranks))
        problem = "; ".join(damage)
    except CheckpointError as error:
        problem = str(error)
    if loaded is not None and not problem:
        lost = [piece.key for piece in engine.slices() if not loaded.engine.holds(piece.key, box=piece.box)]
        problem = f"{loaded.directory} is of another layout: it lacks {lost[0]} as this rank holds it" if lost else ""
    shapes = {} if loaded is None else {kind: loaded.engine.shapes(kind) for kind in KINDS}
    found = engine.gather({"problem": problem, "shapes": shapes})
    problems = [one["problem"] for one in found if one["problem"]]
    if problems or loaded is None:
        if engine.is_main:
            get_log().warning("the replica in the hosts' memory is of no use: %s", problems[0])
        return None
    loaded.engine.join_shapes(one["shapes"] for one in found)
    return loaded


def _steps(folder: Path | None) -> set[tuple[int, str]]:
    """The steps of which this host has its part, each with the name of the save: the same step may be saved again, in
    another history."""
    steps = set()
    for path in list_checkpoints(folder) if folder is not None else []:
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if manifest.part_of:
            steps.add((step_of(path.name) or 0, manifest.part_of))
    return steps
