"""Time contestants side by side: every round runs each once, so that all see the same machine."""

from __future__ import annotations

import dataclasses
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


def race(contestants: dict[str, Callable[[], object]], *, flops: float, rounds: int) -> list[Timing]:
    """Run every contestant once to warm up and `rounds` times in turn."""
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds + 1):
        for name, run in contestants.items():
            started, used = time.perf_counter(), time.process_time()
            run()
            if index:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return [Timing(name, flops, tuple(wall[name]), tuple(cpu[name])) for name in contestants]
