"""Schedules of pipeline stages: every pass once, nothing before its time, as short and as lean as 1F1B."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from ernie5.parallel.schedule import (
    Action,
    evaluation_schedule,
    most_in_flight,
    needed_before,
    training_schedule,
)

SHAPES = [
    (stages, sections, micro)
    for stages, sections, micro in itertools.product((1, 2, 3, 4, 6), (1, 2, 3), (1, 2, 3, 4, 5, 8, 12))
    if stages > 1 or sections == 1
]


def play(schedule: tuple[tuple[Action, ...], ...], *, last: int) -> tuple[int, list[int]]:
    """Steps of one pass each until all is done, and the most passes that each stage had in flight.

    A stage does the next action of its list or waits; a list that waits for ever fails.
    """
    left, done, steps = [list(actions) for actions in schedule], set(), 0
    flying, most = [0] * len(left), [0] * len(left)
    while any(left):
        ready = [
            actions[0] if actions and all(before in done for before in needed_before(actions[0], last=last)) else None
            for actions in left
        ]
        assert any(ready), f"all stages wait: {[actions[:1] for actions in left]}"
        for stage, action in enumerate(ready):
            if action is not None:
                left[stage].pop(0)
                flying[stage] += 1 if action.is_forward else -1
                most[stage] = max(most[stage], flying[stage])
        done.update(action for action in ready if action is not None)
        steps += 1
    return steps, most


@pytest.mark.parametrize("stages,sections,micro", SHAPES)
def test_every_schedule_ends_with_every_pass_done_once_on_its_stage(stages: int, sections: int, micro: int) -> None:
    made = training_schedule(stages=stages, sections_per_stage=sections, micro_batches=micro)
    count = Counter(action for actions in made for action in actions)
    everything = itertools.product((True, False), range(stages * sections), range(micro))
    assert count == Counter(Action(*which) for which in everything)
    assert all(action.section % stages == stage for stage, actions in enumerate(made) for action in actions)
    steps, most = play(made, last=stages * sections - 1)
    limits = [most_in_flight(stage, stages=stages, sections_per_stage=sections) for stage in range(stages)]
    assert all(found <= limit for found, limit in zip(most, limits, strict=True))
    if sections == 1 or micro % stages == 0:  # only filling and draining is idle
        assert steps == 2 * (micro * sections + stages - 1)


@pytest.mark.parametrize("stages,sections,micro", SHAPES)
def test_a_link_receives_in_the_order_in_which_it_is_sent_to(stages: int, sections: int, micro: int) -> None:
    """Between two neighbours, forward and backward, and around the end apart from the other links."""
    made = training_schedule(stages=stages, sections_per_stage=sections, micro_batches=micro)
    for is_forward, sender in itertools.product((True, False), range(stages)):
        step = 1 if is_forward else -1
        receiver = (sender + step) % stages
        for wraps in (False, True):
            sent = [
                (action.section + step, action.micro) for action in made[sender]
                if action.is_forward == is_forward and 0 <= action.section + step < stages * sections
                and (min(action.section, action.section + step) % stages == stages - 1) == wraps
            ]
            received = [
                (action.section, action.micro) for action in made[receiver]
                if action.is_forward == is_forward and 0 <= action.section - step < stages * sections
                and (min(action.section, action.section - step) % stages == stages - 1) == wraps
            ]
            assert sent == received


def test_the_first_stage_of_four_holds_four_micro_batches_and_the_last_one() -> None:
    _, most = play(training_schedule(stages=4, sections_per_stage=1, micro_batches=64), last=3)
    assert most == [4, 3, 2, 1]


def test_one_stage_goes_forward_and_back_in_turn() -> None:
    (made,) = training_schedule(stages=1, sections_per_stage=1, micro_batches=3)
    assert [(action.is_forward, action.micro) for action in made] == [(f, m) for m in range(3) for f in (True, False)]


def test_interleaving_makes_the_idle_part_smaller() -> None:
    """In units of a whole stage's pass: (stages - 1) / sections instead of stages - 1, twice."""
    plain, _ = play(training_schedule(stages=4, sections_per_stage=1, micro_batches=8), last=3)
    halves, _ = play(training_schedule(stages=4, sections_per_stage=2, micro_batches=8), last=7)
    assert plain == 2 * (8 + 3) and halves / 2 == 2 * (8 + 1.5)


def test_evaluation_only_goes_forward() -> None:
    made = evaluation_schedule(stages=2, sections_per_stage=2, micro_batches=1)
    assert made == ((Action(True, 0, 0), Action(True, 2, 0)), (Action(True, 1, 0), Action(True, 3, 0)))
