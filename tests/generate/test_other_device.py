"""Generation and evaluation of a model that is not where its tokenizers are, as on a GPU."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.data.examples import PromptPart
from ernie5.data.shards import list_shards, open_corpus
from ernie5.evaluate.config import EvaluateConfig
from ernie5.evaluate.runner import evaluate
from ernie5.evaluate.subject import Subject
from ernie5.records import TensorRecord

DRAWN = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2, "bit_temperature": 1.0,
         "audio_temperature": 0.9, "audio_guidance": 2.0}
PROMPTS = [
    (PromptPart(text="look: "), PromptPart(image=torch.zeros(3, 16, 16)), PromptPart(video=torch.zeros(3, 5, 16, 16)),
     PromptPart(audio=torch.ones(3000) * 0.1), PromptPart(text=" and then?")),
    (PromptPart(text="a red ball"),),
]


@pytest.fixture
def world(
    build_tiny_world: Callable, other_device: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> object:
    """A tiny world whose model is on the other device, and its tokenizers on the CPU."""
    monkeypatch.setattr(TensorRecord, "to", lambda record, device: record.map_tensors(other_device.carry))
    built = build_tiny_world(tmp_path)
    other_device.bring(built.generation.decoder.model)
    return built


@pytest.mark.parametrize("changes", [{}, DRAWN, {"beam": 3}], ids=["greedy", "drawn", "beam"])
def test_a_model_elsewhere_answers_in_every_kind(
    world: object, other_device: types.ModuleType, changes: dict[str, float]
) -> None:
    generation = world.generation.with_config(dataclasses.replace(world.generation.config, **changes))
    with other_device.other_device():
        assert all(isinstance(text, str) for text in generation.write(PROMPTS))
        assert generation.draw(PROMPTS).shape == (2, 3, 16, 16)
        assert generation.film(PROMPTS).shape == (2, 3, 5, 16, 16)
        for spoken in generation.speak(PROMPTS, speakers=[None, torch.ones(160)]):
            assert spoken.codes.device.type == spoken.waveform.device.type == "cpu"


def test_a_model_elsewhere_is_evaluated(world: object, other_device: types.ModuleType) -> None:
    corpus = open_corpus(list_shards((str(world.shards),)))
    subject = Subject(world.generation, world.data, EvaluateConfig(), corpus)
    with other_device.other_device():
        found = evaluate(subject, checkpoint="tiny", step=0)
    assert len(found.figures) > 8 and not found.skipped
