"""The whole evaluation over a tiny world."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.data.shards import list_shards, open_corpus
from ernie5.evaluate.command import describe
from ernie5.evaluate.config import EvaluateConfig
from ernie5.evaluate.figures import Evaluation, parse_evaluation
from ernie5.evaluate.likelihood import measure_text, survey_validation
from ernie5.evaluate.runner import evaluate
from ernie5.evaluate.subject import Subject

KEYS = {
    "text_bits_per_byte_order2", "text_bits_per_byte_order3", "text_bits_per_byte_xz", "image_to_text_keywords",
    "audio_to_text_loss", "audio_to_text_words", "text_to_image_nearest", "text_to_audio_nearest",
    "video_next_frame_bits", "video_next_frame_bits_requantised", "expert_load",
    "expert_load_plain",
}


def _subject(world: object, config: EvaluateConfig = EvaluateConfig(batch_rows=4)) -> Subject:
    return Subject(world.generation, world.data, config, open_corpus(list_shards(str(world.shards))))


@pytest.fixture(scope="module")
def world(build_tiny_world: Callable, tmp_path_factory: pytest.TempPathFactory) -> object:
    return build_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def evaluation(world: object) -> Evaluation:
    return evaluate(_subject(world), checkpoint="ckpt", step=3)


def test_every_figure_is_there_with_its_baseline(evaluation: Evaluation, tmp_path: Path) -> None:
    assert {figure.key for figure in evaluation.figures} == KEYS and not evaluation.skipped
    assert all(math.isfinite(figure.value) and math.isfinite(figure.baseline) for figure in evaluation.figures)
    assert {loss.modality for loss in evaluation.losses} == {"text", "image", "video", "audio"}
    assert len(evaluation.routing.groups) == 6 and len(evaluation.routing.loads) == 3
    (tmp_path / "e.json").write_text(evaluation.to_json())
    assert parse_evaluation(tmp_path / "e.json") == evaluation
    assert set(json.loads(evaluation.to_json())["figures"]) == KEYS
    assert "order-2" in describe(evaluation)


def test_an_untrained_model_knows_no_more_than_chance(evaluation: Evaluation) -> None:
    nats = {loss.modality: loss.nats for loss in evaluation.losses}
    # A bit costs ln 2 and a code ln 17 under even odds; random weights stray by less than a third.
    assert nats["image"] == pytest.approx(math.log(2), rel=0.34)
    assert nats["video"] == pytest.approx(math.log(2), rel=0.34)
    assert nats["audio"] == pytest.approx(math.log(17), rel=0.34)


def test_bits_per_byte_do_not_depend_on_how_rows_are_batched(world: object) -> None:
    one = measure_text(_subject(world, EvaluateConfig(batch_rows=1)))[0]
    many = measure_text(_subject(world, EvaluateConfig(batch_rows=7)))[0]
    assert one.value == pytest.approx(many.value, rel=1e-5)
    assert one.samples == sum(len(f"The {c} ball moves to the left. ") * 6 for c in ("red", "green", "blue"))


def test_loads_are_measured_with_trainings_draws_and_losses_without(world: object) -> None:
    """The bias evens out what training shows: most of its texts are cut by BPE-dropout."""
    subject = _subject(world)

    def lengths(*, has_draws: bool) -> list[int]:
        found = subject.documents("text", split="validation", count=0, has_draws=has_draws)
        return [document.length for document in found]

    plain, drawn = lengths(has_draws=False), lengths(has_draws=True)
    assert len(drawn) == len(plain) and sum(drawn) > sum(plain)  # dropped merges make more tokens
    assert lengths(has_draws=True) == drawn and lengths(has_draws=False) == plain
    survey = survey_validation(subject)
    assert survey.group_loads.shape == survey.drawn_loads.shape and not survey.group_loads.equal(survey.drawn_loads)


def test_a_model_without_media_is_measured_on_text_and_says_what_is_missing(
    build_tiny_world: Callable, tmp_path: Path
) -> None:
    found = evaluate(_subject(build_tiny_world(tmp_path, modalities=("text",))), checkpoint="c", step=0)
    assert {loss.modality for loss in found.losses} == {"text"}
    assert len(found.skipped) == 6
