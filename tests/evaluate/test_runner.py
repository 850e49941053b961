"""The whole evaluation over a tiny world."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.data.config import MixtureConfig
from ernie5.data.examples import PromptPart
from ernie5.data.samples import Caption
from ernie5.data.shards import ShardWriter, list_shards, open_corpus
from ernie5.errors import DataError, NumericsError, TokenizerError
from ernie5.evaluate import likelihood
from ernie5.evaluate.answers import measure_captions, measure_pictures, measure_speech, measure_transcripts
from ernie5.evaluate.command import describe
from ernie5.evaluate.config import EvaluateConfig
from ernie5.evaluate.figures import Evaluation, parse_evaluation
from ernie5.evaluate.likelihood import measure_clips, measure_text, survey_validation
from ernie5.evaluate.runner import evaluate
from ernie5.evaluate.subject import Subject
from ernie5.generate.interleave import Generation
from ernie5.tokenizers.visual.tokenizer import load_visual_tokenizer

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


def test_weights_that_are_not_numbers_are_refused_and_not_measured(build_tiny_world: Callable, tmp_path: Path) -> None:
    broken = build_tiny_world(tmp_path)
    next(broken.generation.decoder.model.parameters()).data.fill_(math.nan)
    with pytest.raises(NumericsError, match=r"loss of ckpt is not finite \(text nan.*earlier checkpoint"):
        evaluate(_subject(broken), checkpoint="ckpt", step=3)


def test_shards_without_a_validation_sample_are_refused_instead_of_measuring_nothing(world: object) -> None:
    corpus = open_corpus(list_shards(str(world.shards)), split="train")
    subject = dataclasses.replace(_subject(world), corpus=corpus)
    with pytest.raises(DataError, match=rf"none of the {len(corpus)} samples is of the validation split.*--data"):
        evaluate(subject, checkpoint="ckpt", step=3)


def test_tokenizers_that_the_model_was_not_trained_with_are_refused_before_an_index_runs_out(world: object) -> None:
    model, tokenizers = world.generation.decoder.model, world.generation.tokenizers
    other = dataclasses.replace(tokenizers, visual=load_visual_tokenizer("embedded"))
    generation = Generation(model, tokenizers=other, data=world.data, config=world.generation.config)
    with pytest.raises(TokenizerError, match=r"model\.visual\.\w+ = \d+, and the tokenizer at hand needs \d+"):
        generation.draw([(PromptPart(text="a cat"),)])
    with pytest.raises(TokenizerError, match="which an export does not keep"):
        evaluate(dataclasses.replace(_subject(world), generation=generation), checkpoint="ckpt", step=3)
    generation.require("audio")


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


def test_measures_leave_out_the_samples_that_training_leaves_out(world: object, tmp_path: Path) -> None:
    """A picture, a clip and a sound that are none, and a caption longer than a row; the rest is measured."""
    whole = open_corpus(list_shards(str(world.shards)))
    with ShardWriter(tmp_path, prefix="bad", max_bytes=1 << 24) as writer:
        for split in ("train", "validation"):
            for task in ("image", "video", "audio"):
                sample = whole.read(next(ref for ref in whole.samples(task) if ref.split == split))
                torn = tuple(dataclasses.replace(media, data=media.data[:30]) for media in sample.media)
                writer.write(dataclasses.replace(sample, key=f"torn-{sample.key}", media=torn))
                if task == "video":
                    meta = dataclasses.replace(sample.meta, captions=(Caption("en", "a ball " * 60),))
                    writer.write(dataclasses.replace(sample, key=f"long-{sample.key}", meta=meta))
    corpus = open_corpus(list_shards([str(world.shards), str(tmp_path)]))
    measures = (measure_captions, measure_transcripts, measure_pictures, measure_speech, measure_clips)
    for measure in measures:
        plain, beside = measure(_subject(world)), measure(dataclasses.replace(_subject(world), corpus=corpus))
        assert plain and [figure.samples for figure in beside] == [figure.samples for figure in plain]


def test_targets_are_counted_one_by_one_beyond_what_fp32_counts(
    world: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_each(number: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(text=number, image=number, video=number, audio=number)

    output = types.SimpleNamespace(routing=types.SimpleNamespace(group_loads=torch.ones(1, 6, 4)))
    batches = [types.SimpleNamespace(counts=functools.partial(of_each, number)) for number in (2**24, 1, 1, 1)]
    monkeypatch.setattr(likelihood, "losses", lambda output, batch: of_each(1))
    monkeypatch.setattr(
        likelihood, "_mixture_outputs",
        lambda subject, task, *, has_draws: [(output, batch, 1.0) for batch in batches] if task == "text" else [],
    )
    assert {loss.targets for loss in survey_validation(_subject(world)).losses} == {2**24 + 3}


def test_pictures_of_an_odd_number_of_cells_are_drawn_and_measured_but_not_read(world: object) -> None:
    """Training takes them where no task reads pictures or clips."""
    drawing = MixtureConfig(image_to_text=0.0, video_to_text=0.0, page=0.0)
    data = dataclasses.replace(world.data, image_pixels=24, video_pixels=24, sequence_tokens=200, mixture=drawing)
    plain = world.generation
    generation = Generation(plain.decoder.model, tokenizers=plain.tokenizers, data=data, config=plain.config)
    subject = dataclasses.replace(_subject(world), generation=generation, data=data)
    found = evaluate(subject, checkpoint="c", step=0)
    assert {figure.key for figure in found.figures} == KEYS - {"image_to_text_keywords"}
    assert found.skipped[0].startswith("captions: ") and len(found.skipped) == 1


def test_a_model_without_media_is_measured_on_text_and_says_what_is_missing(
    build_tiny_world: Callable, tmp_path: Path
) -> None:
    found = evaluate(_subject(build_tiny_world(tmp_path, modalities=("text",))), checkpoint="c", step=0)
    assert {loss.modality for loss in found.losses} == {"text"}
    assert len(found.skipped) == 6
