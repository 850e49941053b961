"""Sampling: distributions, limits and seeds."""

from __future__ import annotations

import pytest
import torch

from ernie5.config.base import Config
from ernie5.errors import ConfigError
from ernie5.evaluate.config import EvaluateConfig
from ernie5.generate import sampling
from ernie5.generate.config import GenerateConfig


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_temperature_zero_takes_the_likeliest_id() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0], [5.0, -1.0, 4.9]])
    assert sampling.sample_ids(logits, sampling=sampling.Sampling(), generator=_generator()).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", (1e-20, 1e-39, 1e-320))
def test_a_temperature_of_next_to_nothing_takes_the_likeliest_id(temperature: float) -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0], [5.0, -1.0, 4.9]])
    choice = sampling.Sampling(temperature=temperature)
    assert sampling.sample_ids(logits, sampling=choice, generator=_generator()).tolist() == [1, 0]


@pytest.mark.parametrize("ignored", ({"temperature": 0.7}, {"repetition_penalty": 1.2}), ids=lambda given: min(given))
def test_a_beam_beside_settings_that_it_would_ignore_is_refused(ignored: dict[str, float]) -> None:
    GenerateConfig(beam=1, **ignored)
    with pytest.raises(ConfigError, match="search of 3 beams draws nothing.*or beam 1"):
        GenerateConfig(beam=3, **ignored)


def test_sampled_ids_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(20000, 1)
    drawn = sampling.sample_ids(logits, sampling=sampling.Sampling(temperature=0.7), generator=_generator())
    frequency = torch.bincount(drawn, minlength=3) / 20000
    # Three standard errors of a frequency near 1/2 over 20,000 draws are 0.011.
    assert torch.allclose(frequency, (logits[0] / 0.7).softmax(dim=-1), atol=0.011)


def test_equal_seeds_draw_equal_ids_and_bits() -> None:
    logits = torch.randn(64, 50, generator=_generator(1))
    choice = sampling.Sampling(temperature=1.0, top_k=20, top_p=0.9)
    first = sampling.sample_ids(logits, sampling=choice, generator=_generator(7))
    assert torch.equal(first, sampling.sample_ids(logits, sampling=choice, generator=_generator(7)))
    bits = sampling.sample_bits(logits, temperature=1.0, generator=_generator(7))
    assert torch.equal(bits, sampling.sample_bits(logits, temperature=1.0, generator=_generator(7)))


@pytest.mark.parametrize("schema", (GenerateConfig, EvaluateConfig))
def test_a_seed_that_no_generator_takes_is_refused_as_a_setting(schema: type[Config]) -> None:
    largest = 2**63 - 1
    torch.Generator().manual_seed(schema(seed=largest).seed)
    with pytest.raises(ConfigError, match=f"must lie between 0 and {largest}"):
        schema(seed=2**64)


def test_top_k_never_draws_outside_even_with_ties() -> None:
    logits = torch.zeros(500, 10)
    kept = sampling.keep_top_k(logits, top_k=3)
    assert torch.isfinite(kept).sum(dim=1).unique().tolist() == [3]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.61, 2), (0.93, 3), (1.0, 4), (1e-6, 1)])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: int) -> None:
    logits = torch.tensor([[0.05, 0.6, 0.3, 0.05]]).log()
    assert int(torch.isfinite(sampling.keep_top_p(logits, top_p=top_p)).sum()) == kept


def test_repetition_penalty_pushes_seen_ids_down_whatever_their_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[0, 1, -1, -1]])
    punished = sampling.penalise_repetition(logits, previous=seen, penalty=2.0)
    assert punished.tolist() == [[1.0, -4.0, 1.0]]
    nothing = sampling.penalise_repetition(logits, previous=torch.tensor([[-1, -1]]), penalty=2.0)
    assert torch.equal(nothing, logits)


def test_guidance_of_one_is_the_condition_alone() -> None:
    conditional, other = torch.randn(3, 5), torch.full((3, 5), torch.nan)
    assert torch.equal(sampling.guide(conditional, unconditional=other, scale=1.0), conditional)


def test_bits_follow_the_sigmoid_and_temperature_zero_the_sign() -> None:
    logits = torch.tensor([1.0, -0.5]).repeat(20000, 1)
    drawn = sampling.sample_bits(logits, temperature=1.0, generator=_generator()).mean(dim=0)
    assert torch.allclose(drawn, torch.sigmoid(logits[0]), atol=0.011)
    assert sampling.sample_bits(logits[:1], temperature=0.0, generator=_generator()).tolist() == [[1.0, 0.0]]
