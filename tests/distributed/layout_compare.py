"""How far a row of the layout table ended from its yardstick, and whether that is near enough."""

from __future__ import annotations

import dataclasses
import math

import torch

from layout_replay import Divergence, first_divergences
from layout_rows import Row, Tolerances

# the difference of preferences within which rounding may decide between two experts
SCORE_GAP = 1e-6


@dataclasses.dataclass(frozen=True)
class Worst:
    """The largest difference of a kind, and where it is."""

    value: float = 0.0
    where: str = ""

    def __or__(self, other: Worst) -> Worst:
        return max(self, other, key=lambda one: math.inf if math.isnan(one.value) else one.value)


@dataclasses.dataclass(frozen=True)
class Differences:
    """As the fields of Tolerances, with the largest difference of any parameter; unequal: what must be equal and is
    not; divergences: choices that a free run would have made differently, those that nothing else caused first."""

    losses: Worst
    norms: Worst
    gradients: Worst
    movement: Worst
    hidden: Worst
    evaluated: Worst
    parameters: Worst
    unequal: tuple[str, ...]
    first: tuple[Divergence, ...]
    divergences: int

    def complaints(self, tolerances: Tolerances) -> list[str]:
        """What is beyond `tolerances`; nothing for a row that trains the model of one process."""
        found = [f"{what} differ" for what in self.unequal]
        for field in dataclasses.fields(Tolerances):
            worst, allowed = vars(self)[field.name], vars(tolerances)[field.name]
            if not worst.value <= allowed:
                found.append(f"{field.name}: {worst.value:.1e} at {worst.where}, allowed {allowed:.0e}")
        return found


def compare(result: dict, *, expected: dict, row: Row) -> Differences:
    """Differences of what the worker saw of `row` from what it saw of the yardstick."""
    state, yardstick = result["state"], expected["state"]
    pairs = {name: (state.parameters[name], value) for name, value in yardstick.parameters.items()}
    gradients = expected["gradients"]
    no_evaluation = row.dp > 1  # every data-parallel rank evaluates a row of its own
    return Differences(
        losses=_relative(result["losses"], expected["losses"], what="step {} term {}"),
        norms=_relative([result["norms"]], [expected["norms"]], what="step {1}"),
        gradients=_worst(
            (name, (result["gradients"][name] - value).abs().max(), value.abs().max())
            for name, value in gradients.items() if name in result["gradients"]
        ),
        movement=_worst(
            (name, (found - value).norm(), (value - expected["start"][name]).norm())
            for name, (found, value) in pairs.items()
        ),
        hidden=Worst(float((result["by_hand"] - expected["by_hand"]).abs().max())),
        evaluated=Worst() if no_evaluation else _relative([[result["evaluated"]]], [[expected["evaluated"]]], what=""),
        parameters=_worst((name, (found - value).abs().max(), 1.0) for name, (found, value) in pairs.items()),
        unequal=tuple(_unequal(result, expected)),
        first=tuple(first_divergences(result["divergences"])),
        divergences=len(result["divergences"]),
    )


def _unequal(result: dict, expected: dict) -> list[str]:
    """Decisions are counted, so nothing about them may differ."""
    state, yardstick = result["state"], expected["state"]
    steps = enumerate(zip(result["loads"], expected["loads"], strict=True))
    found = [f"expert loads of step {step}" for step, (one, other) in steps if not torch.equal(one, other)]
    found += [name for name, bias in yardstick.buffers.items() if not torch.equal(state.buffers[name], bias)]
    if set(result["gradients"]) != set(expected["gradients"]):
        found.append("names of gradients")
    return found + (["names of moments"] if set(state.moments) != set(yardstick.moments) else [])


def _relative(found: list[list[float]], expected: list[list[float]], *, what: str) -> Worst:
    cells = (
        (what.format(step, term), abs(a - b), abs(b))
        for step, (one, other) in enumerate(zip(found, expected, strict=True))
        for term, (a, b) in enumerate(zip(one, other, strict=True))
    )
    return _worst(cells)


def _worst(cells) -> Worst:
    """The largest of difference / scale; what should be zero and is not counts as infinite."""
    worst = Worst()
    for where, difference, scale in cells:
        difference, scale = float(difference), float(scale)
        value = difference / scale if scale else (math.inf if difference else 0.0)
        worst |= Worst(value, where)
    return worst
