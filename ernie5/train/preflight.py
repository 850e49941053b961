"""Before the first step: do all hosts run the same thing, see the same storage and clock, and how fast is the network?

`ernie5 train --preflight` (launch/preflight.py under any launcher) checks and stops; train.preflight: true checks and
goes on. Rank 0 prints one line per check. A complaint names host and ranks and ends every rank: exit code 2 for
settings that differ, 3 for a machine, 5 for a rank that does not come. A slow link is said and stops nothing.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

import ernie5
from ernie5.config.load import config_to_dict, config_to_yaml
from ernie5.errors import ConfigError, EnvironmentFault
from ernie5.observe.standing import list_ranks
from ernie5.parallel.probe import Link, measure_axes, measure_links
from ernie5.parallel.rendezvous import meet
from ernie5.parallel.state import join_processes, signals_end_at_once
from ernie5.train.build import choose_device
from ernie5.train.config import RootConfig

COME_SECONDS = 120.0
PACKAGES = ("torch", "deepspeed", "ernie5", "numpy")
CLOCK_SECONDS = 1.0  # markers of hangs and exit.json are compared by their times
CLOCK_ROUNDS = 5
SEEN_SECONDS = 10.0  # network storage shows another host's new file only after its attribute cache has aged
SLOW_FACTOR = 4.0
MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class Preflight:
    """clock: seconds since 1970, as this host believes; say: prints one line of the report, on rank 0."""

    config: RootConfig
    clock: Callable[[], float] = time.time
    say: Callable[[str], None] = print

    def run(self) -> None:
        """All checks in order; collective. Raises LayoutError, ConfigError, EnvironmentFault or PeerError on every
        rank; leaves the process group to the engine. SIGINT and SIGTERM end it at once: every check waits for ranks."""
        with signals_end_at_once():
            self._check_all()

    def _check_all(self) -> None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.config.derive_dp(world_size)
        dims = self.config.parallel.derive_dims(world_size, kv_heads=self.config.model.kv_heads)
        device = choose_device(self.config.engine.device)
        meet(device, seconds=COME_SECONDS)
        join_processes(device)
        hosts = _gather(socket.gethostname())
        ranks = _ranks_of(hosts)
        told = "; ".join(f"{host}: rank {list_ranks(members)}" for host, members in ranks.items())
        self._tell(f"{len(hosts)} ranks on {len(ranks)} hosts ({told}), layout {dims.describe()}")
        self._check_versions(hosts)
        self._check_settings(hosts)
        self._check_storage(hosts)
        self._check_clocks(hosts)
        if len(hosts) > 1:
            for speed in measure_axes(dims, device=device):
                self._tell(
                    f"all-to-all over {speed.axis}: {1e3 * speed.latency_seconds:.2f} ms for 8 bytes, "
                    f"{speed.bytes_per_second / MEGABYTE:.0f} MB/s per rank (slowest group: rank "
                    f"{list_ranks(speed.ranks)})"
                )
        if len(ranks) > 1:
            links = measure_links([members[0] for members in ranks.values()], device=device)
            for line in judge_links(links, hosts=hosts):
                self._tell(line)
        self._tell("passed")

    def _check_versions(self, hosts: Sequence[str]) -> None:
        found = _gather(read_versions())
        _refuse("versions differ", _odd_ones(found, hosts=hosts), way="Install the same everywhere", hosts=hosts)
        self._tell("the same on all hosts: " + ", ".join(f"{name} {version}" for name, version in found[0].items()))

    def _check_settings(self, hosts: Sequence[str]) -> None:
        """The YAML lies on every host's own disk, perhaps in another version."""
        found = [{"settings": digest} for digest in _gather(_digest(config_to_yaml(self.config).encode()))]
        complaints = _odd_ones(found, hosts=hosts)
        if complaints:
            keys = _differing_keys(_gather(config_to_dict(self.config)))
            raise ConfigError(
                f"the settings differ between hosts in {', '.join(keys)}: {_name(complaints, hosts=hosts)}. Give all "
                "ranks the same file and overrides"
            )

    def _check_storage(self, hosts: Sequence[str]) -> None:
        run_dir = Path(self.config.train.run_dir)
        complaints = check_storage(run_dir)
        _refuse(f"train.run_dir = {run_dir} is not shared storage", complaints, hosts=hosts,
                way="All ranks need the same directory, writable")
        self._tell(f"storage: {run_dir.resolve()} is seen and written by all")

    def _check_clocks(self, hosts: Sequence[str]) -> None:
        away = measure_clocks(self.clock)
        wrong = {rank: f"its clock is {abs(seconds):.1f} s {'ahead' if seconds > 0 else 'behind'}"
                 for rank, seconds in enumerate(away) if abs(seconds) > CLOCK_SECONDS}
        _refuse("clocks differ", wrong, hosts=hosts, way=f"At most {CLOCK_SECONDS:g} s are allowed; start NTP there")
        self._tell(f"clocks: at most {max(away) - min(away):.3f} s apart")

    def _tell(self, line: str) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.say(f"preflight: {line}")


def leave() -> None:
    """End the process group, together: a rank that left others behind would be missed by them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def read_versions() -> dict[str, str]:
    """What has to be the same on every host; `source` digests the files of the package, which an editable install of
    another checkout changes without changing its version."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    root = Path(ernie5.__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return {**found, "source": _digest(sources)}


def check_storage(run_dir: Path) -> dict[int, str]:
    """What is wrong with `run_dir`, by rank: every rank reads rank 0's file and writes one that rank 0 reads."""
    rank, token = _rank(), _gather(secrets.token_hex(8))[0]
    folder = run_dir / f".preflight-{token}"
    problem = _attempt(lambda: _write(folder, rank=rank, token=token)) if rank == 0 else ""
    problems = _gather(problem)
    if not problems[0]:
        if rank:
            problem = _attempt(lambda: _see(folder / "0", token=token)) or _attempt(
                lambda: _write(folder, rank=rank, token=token))
        problems = _gather(problem)
        if rank == 0:
            unseen = {other: _attempt(lambda other=other: _see(folder / str(other), token=token))
                      for other, found in enumerate(problems) if not found}
            problems = [found or unseen[other] and f"what it writes is not seen by rank 0 ({unseen[other]})"
                        for other, found in enumerate(problems)]
            shutil.rmtree(folder, ignore_errors=True)
        problems = _gather(problems)[0]
    return {other: found for other, found in enumerate(problems) if found}


def measure_clocks(clock: Callable[[], float]) -> list[float]:
    """Seconds that each rank's clock is ahead of the median. Of some rounds the one nearest to zero counts: a process
    that was late at a barrier is no clock that is wrong."""
    best: list[float] = []
    for _ in range(CLOCK_ROUNDS):
        if dist.is_initialized():
            dist.barrier()
        times = _gather(clock())
        middle = statistics.median(times) if len(times) > 2 else times[0]
        away = [found - middle for found in times]
        best = [min(old, new, key=abs) for old, new in zip(best or away, away, strict=True)]
    return best


def judge_links(links: Sequence[Link], *, hosts: Sequence[str]) -> list[str]:
    """Lines about the host-to-host links: the usual speed, and hosts at a quarter of it or less."""
    speeds = [link.bytes_per_second for link in links]
    usual = max(speeds) if len(links) == 2 else statistics.median(speeds)
    lines = [f"host to host: {usual / MEGABYTE:.0f} MB/s {'at best' if len(links) == 2 else 'in the middle'}"]
    for side, other, verb in (("sender", "receiver", "sends"), ("receiver", "sender", "receives")):
        best: dict[str, float] = collections.defaultdict(float)
        for link in links:
            host = hosts[vars(link)[side]]
            best[host] = max(best[host], link.bytes_per_second)
        lines += [
            f"warning: {host} {verb} at {speed / MEGABYTE:.1f} MB/s at best, the others at {usual / MEGABYTE:.0f}. "
            "Look at its network"
            for host, speed in best.items() if speed < usual / SLOW_FACTOR
        ]
    return lines


def _odd_ones(found: Sequence[Mapping[str, str]], *, hosts: Sequence[str]) -> dict[int, str]:
    """Where a rank differs from what most hosts have (rank 0's host where they are even), by rank."""
    wrong: dict[int, list[str]] = {}
    for name in dict.fromkeys(key for one in found for key in one):
        by_host = {host: one.get(name, "nothing") for host, one in zip(hosts, found, strict=True)}
        counts = collections.Counter([found[0].get(name, "nothing"), *by_host.values()])
        usual = counts.most_common(1)[0][0]
        for rank, one in enumerate(found):
            if one.get(name, "nothing") != usual:
                wrong.setdefault(rank, []).append(f"{name} {one.get(name, 'nothing')}, the others {usual}")
    return {rank: ", ".join(texts) for rank, texts in wrong.items()}


def _refuse(what: str, complaints: Mapping[int, str], *, way: str, hosts: Sequence[str]) -> None:
    """Raise EnvironmentFault where there are complaints."""
    if complaints:
        raise EnvironmentFault(f"preflight: {what}: {_name(complaints, hosts=hosts)}. {way}")


def _name(complaints: Mapping[int, str], *, hosts: Sequence[str]) -> str:
    """Complaints by host; ranks of a host that say the same are named together."""
    grouped: dict[tuple[str, str], list[int]] = {}
    for rank, text in complaints.items():
        grouped.setdefault((hosts[rank], text), []).append(rank)
    return "; ".join(f"{host} (rank {list_ranks(ranks)}): {text}" for (host, text), ranks in grouped.items())


def _differing_keys(configs: Sequence[Mapping[str, object]]) -> list[str]:
    flat = [dict(_flatten(config)) for config in configs]
    return sorted(key for key in flat[0] if any(one.get(key) != flat[0][key] for one in flat))


def _flatten(tree: Mapping[str, object], *, prefix: str = "") -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for key, value in tree.items():
        place = f"{prefix}{key}"
        found += _flatten(value, prefix=f"{place}.") if isinstance(value, dict) else [(place, value)]
    return found


def _write(folder: Path, *, rank: int, token: str) -> None:
    folder.mkdir(parents=True, exist_ok=rank != 0)
    with (folder / str(rank)).open("w", encoding="utf-8") as file:
        file.write(token)
        file.flush()
        os.fsync(file.fileno())


def _see(path: Path, *, token: str) -> None:
    """Raises FileNotFoundError unless `path` holds the token within SEEN_SECONDS."""
    deadline = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if path.read_text(encoding="utf-8") == token:
                return
        time.sleep(0.1)
    raise FileNotFoundError(2, "the others' files are not there, so this is another directory", str(path.parent.parent))


def _attempt(action: Callable[[], None]) -> str:
    """"" or what went wrong."""
    try:
        action()
    except OSError as error:
        return f"{error.strerror} ({error.filename})"
    return ""


def _ranks_of(hosts: Sequence[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: object) -> list:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
