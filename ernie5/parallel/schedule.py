"""In which order a pipeline stage runs the forward and backward passes of its sections: a pure function, torch-free.

One forward, one backward (1F1B), interleaved where a stage has several sections (arXiv:2104.04473, section 2.2). All
stages run forward passes in one order: groups of as many micro-batches as there are stages, each group through all
sections; backward passes likewise, sections reversed. How the two sequences are merged is found by running all stages
in steps of one pass: a stage goes forward while fewer passes are under way than 1F1B allows, else backward. So every
number of micro-batches has a schedule, fewer than stages included; and since a run with those waits was found, none
can wait for ever. Where stages divide the micro-batches only the pipeline's filling is idle: stages - 1 passes of each
kind.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque


@dataclasses.dataclass(frozen=True)
class Action:
    """One pass of micro-batch `micro` through section `section` (numbered over the whole model)."""

    is_forward: bool
    section: int
    micro: int


def most_in_flight(stage: int, *, stages: int, sections_per_stage: int) -> int:
    """Passes that `stage` may have forward but not yet backward: what it holds activations of, at most."""
    if sections_per_stage == 1:
        return stages - stage
    return 2 * (stages - stage - 1) + (sections_per_stage - 1) * stages + 1


@functools.lru_cache(maxsize=32)
def training_schedule(*, stages: int, sections_per_stage: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of every stage, in order."""
    last = stages * sections_per_stage - 1
    forward: list[deque[Action]] = [deque() for _ in range(stages)]
    backward: list[deque[Action]] = [deque() for _ in range(stages)]
    for section, micro in _order(stages, sections_per_stage, micro_batches):
        forward[section % stages].append(Action(True, section, micro))
        backward[(last - section) % stages].append(Action(False, last - section, micro))
    limits = [
        most_in_flight(stage, stages=stages, sections_per_stage=sections_per_stage) for stage in range(stages)
    ]
    schedule: list[list[Action]] = [[] for _ in range(stages)]
    done: set[Action] = set()
    while any(backward):
        step = [
            _choose(forward[stage], backward[stage], done=done, last=last, limit=limits[stage])
            for stage in range(stages)
        ]
        for stage, action in enumerate(step):
            if action is not None:
                (forward if action.is_forward else backward)[stage].popleft()
                schedule[stage].append(action)
        done.update(action for action in step if action is not None)
    return tuple(map(tuple, schedule))


@functools.lru_cache(maxsize=32)
def evaluation_schedule(*, stages: int, sections_per_stage: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """Forward passes alone."""
    order = _order(stages, sections_per_stage, micro_batches)
    return tuple(
        tuple(Action(True, section, micro) for section, micro in order if section % stages == stage)
        for stage in range(stages)
    )


def needed_before(action: Action, *, last: int) -> tuple[Action, ...]:
    """What must have been run before `action`; `last` is the number of the last section."""
    before = []
    if action.is_forward:
        if action.section:
            before.append(Action(True, action.section - 1, action.micro))
    else:
        before.append(Action(True, action.section, action.micro))
        if action.section < last:
            before.append(Action(False, action.section + 1, action.micro))
    return tuple(before)


def _order(stages: int, sections_per_stage: int, micro_batches: int) -> list[tuple[int, int]]:
    """(section, micro) of all forward passes, as every stage meets its own."""
    return [
        (chunk * stages + stage, micro)
        for first in range(0, micro_batches, stages)
        for chunk in range(sections_per_stage)
        for micro in range(first, min(first + stages, micro_batches))
        for stage in range(stages)
    ]


def _choose(
    forward: deque[Action], backward: deque[Action], *, done: set[Action], last: int, limit: int
) -> Action | None:
    """What a stage does in the next step, or None to wait."""
    in_flight = len(backward) - len(forward)
    for queue, allowed in ((forward, in_flight < limit), (backward, True)):
        if queue and allowed and all(action in done for action in needed_before(queue[0], last=last)):
            return queue[0]
    return None
