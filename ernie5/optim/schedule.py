"""Learning rate at a step: linear warm-up, then constant, cosine or WSD (SPEC section 3). A pure function of step."""

from __future__ import annotations

import math

from ernie5.optim.config import OptimConfig


def warmup_steps(config: OptimConfig, *, total_steps: int) -> int:
    """Steps of warm-up: as configured, else min(2000, 5 % of the run), at least 1."""
    if config.schedule.warmup_steps is not None:
        return config.schedule.warmup_steps
    return max(1, min(2000, total_steps // 20))


def learning_rate(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `total_steps`.

    Warm-up over W steps: peak * (step + 1) / W, so that the first step moves and step W - 1 reaches the peak. Then
    constant; or cosine, final + (peak - final) (1 + cos(pi x)) / 2; or WSD, constant until the last
    `decay_fraction` of the run and then final + (peak - final) (1 - sqrt(x)), x in [0, 1] the part of the decay
    that is behind. A step past the end stays at the final value.
    """
    peak, schedule = config.learning_rate, config.schedule
    warmup = warmup_steps(config, total_steps=total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    final = peak * schedule.final_ratio
    start = warmup if schedule.kind == "cosine" else max(warmup, total_steps - decay_steps(config, total_steps))
    done = min(1.0, max(0.0, (step - start + 1) / max(1, total_steps - start)))
    shape = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1.0 - math.sqrt(done)
    return final + (peak - final) * shape


def decay_steps(config: OptimConfig, total_steps: int) -> int:
    """Steps of the last, falling phase of WSD."""
    return round(config.schedule.decay_fraction * total_steps)
