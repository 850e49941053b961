"""The yardstick itself: the gradient of a step does not depend on how its rows are cut into micro-batches."""

from __future__ import annotations

import types

import pytest
import torch


def test_one_by_four_two_by_two_and_four_by_one_give_the_same_gradients(tiny: types.ModuleType) -> None:
    results = []
    for rows in ([4], [2, 2], [1, 1, 1, 1]):
        engine = tiny.make_engine("local")
        sums = engine.accumulate(tiny.cut_rows(rows))
        results.append((float(sums.objective), engine.gradients()))
    for objective, gradients in results[1:]:
        assert objective == pytest.approx(results[0][0], rel=1e-6)
        for name, gradient in results[0][1].items():
            assert (gradients[name] - gradient).abs().max() < 1e-6, name


def test_every_parameter_gets_a_gradient_from_a_text_only_batch(tiny: types.ModuleType) -> None:
    engine = tiny.make_engine("local")
    engine.accumulate(tiny.cut_rows([2], tasks=("text",)))
    missing = set(dict(engine.model.named_parameters())) - set(engine.gradients())
    assert not missing


def test_evaluation_leaves_the_training_state_alone(tiny: types.ModuleType) -> None:
    engine = tiny.make_engine("local")
    before = engine.state()
    sums = engine.evaluate_batch(tiny.cut_rows([2])[0])
    after = engine.state()
    assert float(sums.terms.text) > 0 and not engine.gradients()
    assert all(torch.equal(after.parameters[name], value) for name, value in before.parameters.items())
    assert torch.equal(before.magnitudes, after.magnitudes)
