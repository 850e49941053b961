"""Time contestants side by side: every round runs each once, so that all see the same machine."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of the rounds after the first: wall and CPU (all threads), and their least."""

    name: str
    flops: float
    wall_seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]

    def row(self, *, ours: Timing) -> str:
        """A line of the table: medians, rate by the best round, and the median over rounds of the ratio to ours."""
        ratio = statistics.median(a / b for a, b in zip(self.wall_seconds, ours.wall_seconds, strict=True))
        by_cpu = statistics.median(a / b for a, b in zip(self.cpu_seconds, ours.cpu_seconds, strict=True))
        return (
            f"| {self.name} | {statistics.median(self.wall_seconds):.3f} | {min(self.wall_seconds):.3f} | "
            f"{statistics.median(self.cpu_seconds):.3f} | {self.flops / min(self.wall_seconds) / 1e9:.0f} | "
            f"{ratio:.2f} | {by_cpu:.2f} |"
        )


HEADER = (
    "| contestant | wall s, median | wall s, best | CPU s, median | GFLOP/s, best | wall / ours | CPU / ours |\n"
    "|---|---|---|---|---|---|---|"
)


FEW_PAGES = 2_000


def race(
    contestants: dict[str, Callable[[], object]], *, flops: float, rounds: int, warm_rounds: int = 1
) -> list[Timing]:
    """Run every contestant `rounds` times in turn, after rounds that are not counted (`warm_up`)."""
    warm_up(contestants, rounds=warm_rounds)
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - used)
    return [Timing(name, flops, tuple(wall[name]), tuple(cpu[name])) for name in contestants]


def warm_up(contestants: dict[str, Callable[[], object]], *, rounds: int) -> None:
    """Run each in turn until a round asks the system for few new pages, `rounds` times at most.

    malloc takes several rounds to find places that stay for tensors of some 100 MB, and a page costs 10 us at its first
    touch: an expert layer at X with 65,536 tokens takes 3.6 s, and 5.0 while it still grows.
    """
    for _ in range(rounds):
        most = 0
        for run in contestants.values():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            run()
            most = max(most, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        if most < FEW_PAGES:
            return
