"""What a shape's race comes to: ratios, the share of the machine's rate, the distance from its bound, the next
bottleneck."""

from __future__ import annotations

import dataclasses
import statistics

from machine import Machine
from measure import Timing
from shapes import Shape


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Medians over rounds; ratios are theirs over ours in the same round."""

    name: str
    wall_seconds: float
    cpu_seconds: float
    wall_ratio: float
    cpu_ratio: float


@dataclasses.dataclass(frozen=True)
class ShapeResult:
    """One shape. share: FLOPs per CPU second, optimizer left out, over the machine's bf16 product in this run; bound:
    max(FLOPs / that rate, least bytes / bandwidth) in CPU seconds, and our step's multiple of it."""

    shape: Shape
    gate: float
    contestants: tuple[Contestant, ...]
    parts: dict[str, float]
    share: float
    bound_seconds: float
    over_bound: float
    next_bottleneck: str

    @staticmethod
    def build(
        shape: Shape, *, machine: Machine, gate: float, ours: Timing, pairs: list[tuple[Timing, Timing]],
        parts: dict[str, float],
    ) -> ShapeResult:
        """From timings: ours alone, pairs (ours, other) and CPU seconds by part."""
        contestants = [_contestant(ours, ours=ours), *(_contestant(other, ours=own) for own, other in pairs)]
        whole = statistics.median(ours.cpu_seconds)
        bound = max(shape.step_flops / machine.bf16_cpu, shape.least_bytes / machine.bandwidth_cpu)
        excess = {
            part: seconds - shape.part_flops.get(part, 0.0) / machine.bf16_cpu for part, seconds in parts.items()
        }
        name = max(excess, key=lambda part: excess[part])
        return ShapeResult(
            shape, gate, tuple(contestants), parts,
            share=shape.step_flops / (whole - parts["optimizer"]) / machine.bf16_cpu,
            bound_seconds=bound, over_bound=whole / bound,
            next_bottleneck=f"{name}: {parts[name]:.3f} s, {excess[name]:.3f} s more than its products at full rate",
        )

    def best_peer(self) -> Contestant:
        """The fastest of those that are not ours."""
        return min((c for c in self.contestants if not c.name.startswith("ours")), key=lambda c: c.cpu_ratio)

    def summary(self) -> str:
        """Three lines for a reader."""
        best = self.best_peer()
        parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.parts.items())
        return (
            f"{self.shape.name}: best peer {best.name}, {best.wall_ratio:.2f} times our wall and {best.cpu_ratio:.2f} "
            f"times our CPU time; {self.share:.0%} of the machine's bf16 rate without the optimizer; "
            f"{self.over_bound:.2f} times the bound of {self.bound_seconds:.3f} CPU s\n"
            f"CPU seconds by part: {parts}\nnext bottleneck: {self.next_bottleneck}"
        )

    def record(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)


def _contestant(timing: Timing, *, ours: Timing) -> Contestant:
    def ratio(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    return Contestant(
        timing.name, statistics.median(timing.wall_seconds), statistics.median(timing.cpu_seconds),
        ratio(timing.wall_seconds, ours.wall_seconds), ratio(timing.cpu_seconds, ours.cpu_seconds),
    )
