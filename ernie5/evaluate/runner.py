"""Runs every measurement of a subject and gathers the figures of "It learns"."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch

from ernie5.errors import DataError, NumericsError
from ernie5.evaluate import answers, likelihood
from ernie5.evaluate.figures import Evaluation, Figure, Loss, RoutingFigures, Timing
from ernie5.evaluate.routing import describe_routing
from ernie5.evaluate.subject import Subject

LOAD_LIMIT = 1.5
MEASUREMENTS: tuple[tuple[str, Callable[[Subject], list[Figure]]], ...] = (
    ("text", likelihood.measure_text),
    ("captions", answers.measure_captions),
    ("transcript loss", likelihood.measure_transcript_loss),
    ("transcripts", answers.measure_transcripts),
    ("text to image", answers.measure_pictures),
    ("text to speech", answers.measure_speech),
    ("next frames", likelihood.measure_clips),
)


@torch.no_grad()
def evaluate(
    subject: Subject, *, checkpoint: str, step: int, announce: Callable[[str], None] = lambda words: None
) -> Evaluation:
    """All figures of one checkpoint. announce: told the name of each part as it begins.

    A part whose modality or samples are missing is listed in `skipped`, so that a figure is never silently absent.
    Raises DataError where no sample is of the validation split, TokenizerError where the model was trained with other
    tokenizers, NumericsError where a loss is not finite: nothing that
    is measured of such weights means anything.
    """
    if not any(ref.split == "validation" for ref in subject.corpus.refs):
        raise DataError(
            f"none of the {len(subject.corpus)} samples is of the validation split, on which all is measured. Name "
            'shards that hold some (--data SHARDS), or build again with "split": "validation" in the json of some.'
        )
    for modality in subject.generation.decoder.model.config.modalities:
        subject.generation.require(modality)
    timings, skipped, figures = [], [], []
    announce("losses and routing")
    start = time.monotonic()
    survey = likelihood.survey_validation(subject)
    _require_finite(survey.losses, checkpoint=checkpoint)
    timings.append(Timing("losses and routing", time.monotonic() - start))
    for name, measure in MEASUREMENTS:
        announce(name)
        start = time.monotonic()
        found = measure(subject)
        timings.append(Timing(name, time.monotonic() - start))
        figures += found
        if not found:
            skipped.append(f"{name}: the model or the validation samples have none of it, or none that can be read")
    routing = describe_routing(survey.drawn_loads) if survey.drawn_loads.sum() > 0 else None
    if routing is not None:
        figures += load_figures(routing, plain=describe_routing(survey.group_loads))
    return Evaluation(checkpoint, step, survey.losses, tuple(figures), routing, tuple(timings), tuple(skipped))


def _require_finite(losses: Iterable[Loss], *, checkpoint: str) -> None:
    broken = [f"{loss.modality} {loss.nats}" for loss in losses if not math.isfinite(loss.nats)]
    if broken:
        raise NumericsError(
            f"The validation loss of {checkpoint} is not finite ({', '.join(broken)}): its weights hold NaN or give "
            "numbers too large. Evaluate an earlier checkpoint; what its run said of NaN stands in log.txt."
        )


def load_figures(routing: RoutingFigures, *, plain: RoutingFigures) -> list[Figure]:
    """The busiest expert of the worst layer over the mean, on validation samples read as training reads them (the goal;
    dead experts make it fail, whatever the ratio) and on `plain` ones."""
    title = "Experts: busiest over mean, worst layer"
    goal = None if routing.dead_experts == 0 else 0.0
    return [
        Figure("expert_load", title, max(routing.max_load_ratio), LOAD_LIMIT, "limit", "x mean", True,
               len(routing.loads), goal=goal),
        Figure("expert_load_plain", f"{title}, without training's draws", max(plain.max_load_ratio), LOAD_LIMIT,
               "limit", "x mean", True, len(plain.loads), is_goal=False),
    ]
