"""Replayed choices are made, what would have been others is found, and a replay without any is the free run."""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.checkpoint import checkpoint

from layout_replay import Choices, Divergence, Noted, Notes
from layout_rows import ROWS
from layout_worker import make_engine, make_rows

ROW = ROWS["ep2"].yardstick()


def run_step(recorded: Notes | None, *, watches: bool = True) -> tuple[Choices | None, dict, torch.Tensor]:
    """One step in one process: its choices, gradients, and loads [L, E]."""
    engine, batches = make_engine(ROW), make_rows(0, row=ROW, rows=2)
    if not watches:
        sums = engine.accumulate(batches)
        return None, engine.gradients(), sums.routing.loads
    choices = Choices(engine, layout=None, recorded=recorded)
    with choices.watch(batches, step=0, first=0, stride=1):
        sums = engine.accumulate(batches)
    return choices, engine.gradients(), sums.routing.loads


def test_replaying_its_own_choices_is_the_free_run_bit_for_bit() -> None:
    _, free, loads = run_step(None, watches=False)
    noted, watched, _ = run_step(None)
    again, replayed, replayed_loads = run_step(noted.noted)
    assert not again.divergences and torch.equal(loads, replayed_loads)
    assert all(torch.equal(value, watched[name]) and torch.equal(value, replayed[name]) for name, value in free.items())


def test_micro_batches_of_speech_alone_are_told_apart() -> None:
    row = ROWS["ep2-rank-without-text"].yardstick()  # its odd rows have one token id
    noted: list[Choices] = []
    for recorded in (None, "first"):
        engine, batches = make_engine(row), make_rows(0, row=row, rows=4)
        noted.append(Choices(engine, layout=None, recorded=noted[0].noted if recorded else None))
        with noted[-1].watch(batches, step=0, first=0, stride=1):
            engine.accumulate(batches)
    assert {micro_batch for _, micro_batch, _ in noted[0].noted} == {0, 1, 2, 3}
    assert not noted[1].divergences


def test_a_layer_that_runs_again_later_is_that_of_its_own_micro_batch() -> None:
    """As under a pipeline's recompute: both micro-batches have run when the first one's layers run again."""
    noted, _, _ = run_step(None)
    engine, batches = make_engine(ROW), make_rows(0, row=ROW, rows=2)
    router, inputs = engine.model.routers()[0], []
    caught = router.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((*args, kwargs)), with_kwargs=True)
    for batch in batches:
        engine.model(batch)
    caught.remove()
    again = Choices(engine, layout=None, recorded=noted.noted)
    with again.watch(batches, step=0, first=0, stride=1):
        weights = [
            checkpoint(lambda x, kwargs=kwargs: router(x, **kwargs).weights, hidden.detach(), use_reentrant=False)
            for hidden, kwargs in inputs
        ]
        for one in weights:
            one.square().sum().backward()
    assert set(again._calls.values()) == {2} and not again.divergences


def test_another_recorded_choice_is_made_and_reported_with_its_gap() -> None:
    noted, free, loads = run_step(None)
    place, column = (0, 1, 1), 0  # the first token, which all others of its document read
    there = noted.noted[place]
    absent = min(set(range(8)) - set(there.choices[column].tolist()))
    changed = there.choices.clone()
    given_up = int(changed[column, 0])
    changed[column] = torch.tensor(sorted((absent, int(changed[column, 1]))))
    recorded = {**noted.noted, place: dataclasses.replace(there, choices=changed)}
    replayed, gradients, other_loads = run_step(recorded)
    (found,) = [one for one in replayed.divergences if (one.micro_batch, one.layer, one.column) == (1, 1, column)]
    # the run preferred what it had chosen: the recorded expert looks worse by the difference of preferences
    assert found.gap == float(there.preference[column, absent] - there.preference[column, given_up]) < 0
    moved = other_loads[1] - loads[1]
    assert moved[absent] == 1 and moved[given_up] == -1 and moved.abs().sum() == 2
    assert not torch.equal(gradients["layers.1.moe.experts.down"], free["layers.1.moe.experts.down"])


def test_a_divergence_has_the_gap_of_the_recorded_preference() -> None:
    noted, _, _ = run_step(None)
    place, column = (0, 0, 0), 3
    there = noted.noted[place]
    order = there.preference[column].sort(descending=True).indices
    other = there.choices.clone()
    other[column] = order[[0, 2]].sort().values
    preference = there.preference.clone()
    preference[column, order[2]] = preference[column, order[1]] + 3e-7  # the yardstick preferred it by a hair
    replayed, _, _ = run_step({**noted.noted, place: Noted(other, preference)})
    first = min(replayed.divergences)
    assert first == Divergence(0, 0, 0, column, first.gap) and 0 < first.gap < 1e-6
