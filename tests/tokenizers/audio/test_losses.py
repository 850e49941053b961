"""Losses of the audio codec: zero where nothing differs, finite on silence, hinge and features in closed form."""

import pytest
import torch

from ernie5.errors import ConfigError
from ernie5.tokenizers.audio.losses import (
    CEPSTRA,
    Discriminators,
    SemanticTeacher,
    SpectralLoss,
    feature_distance,
    hinge_discriminator,
    hinge_generator,
    semantic_loss,
)
from ernie5.tokenizers.config import JUDGED_SAMPLES, AudioTokenizerConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hop": 100, "fft_size": 400, "factors": (1, 3)}, "multiple of 8 samples"),
        ({"crop_frames": 1, "adversarial_frames": 1}, "at least 2"),
        ({"adversarial_frames": 2}, "Use 3 or more"),
    ],
)
def test_settings_that_teacher_or_adversary_cannot_take_are_refused(changes: dict, words: str) -> None:
    """Each ended the first step: a shape that is none, the deviation of one frame, a kernel larger than its input."""
    with pytest.raises(ConfigError, match=words):
        AudioTokenizerConfig(**changes)


def test_the_shortest_sound_that_is_judged_is_the_one_that_the_settings_know() -> None:
    Discriminators()(torch.randn(1, JUDGED_SAMPLES))
    with pytest.raises(RuntimeError, match="Kernel size"):
        Discriminators()(torch.randn(1, JUDGED_SAMPLES - 1))


def noise(seed: int, *, rows: int = 2, samples: int = 12_800) -> torch.Tensor:
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))


def test_the_spectral_loss_is_zero_for_equal_speech_and_grows_with_the_difference():
    loss = SpectralLoss(sample_rate=16_000)
    clean = noise(0)
    assert [float(term) for term in loss(clean, target=clean)] == [0.0, 0.0]
    near, far = (sum(loss(clean + scale * noise(1), target=clean)) for scale in (0.1, 1.0))
    assert 0 < float(near) < float(far)


def test_the_spectral_loss_has_finite_gradients_on_silence():
    silence = torch.zeros(1, 5120, requires_grad=True)
    sum(SpectralLoss(sample_rate=16_000)(silence, target=torch.zeros(1, 5120))).backward()
    assert torch.isfinite(silence.grad).all()


def test_the_teacher_gives_one_row_per_codec_frame_and_ignores_loudness():
    teacher = SemanticTeacher(sample_rate=16_000, samples_per_frame=1280)
    speech = noise(2)
    features = teacher(speech)
    assert features.shape == (2, 10, 2 * CEPSTRA)
    torch.testing.assert_close(teacher(0.5 * speech), features, atol=1e-3, rtol=1e-3)


def test_the_teacher_is_finite_on_silence():
    teacher = SemanticTeacher(sample_rate=16_000, samples_per_frame=1280)
    assert torch.isfinite(teacher(torch.zeros(1, 2560))).all()


def test_the_semantic_loss_is_zero_only_for_the_teacher_itself():
    teacher = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    assert float(semantic_loss(teacher, teacher=teacher)) == pytest.approx(0.0, abs=1e-6)
    assert float(semantic_loss(-teacher, teacher=teacher)) > 2.0


def test_hinge_terms_equal_their_closed_form():
    real = [[torch.zeros(1), torch.tensor([2.0, 0.5])]]
    fake = [[torch.zeros(1), torch.tensor([-3.0, 0.5])]]
    # real: relu(1-2)=0, relu(1-0.5)=0.5 -> 0.25; fake: relu(1-3)=0, relu(1+0.5)=1.5 -> 0.75.
    assert float(hinge_discriminator(real, fake=fake)) == pytest.approx(1.0)
    assert float(hinge_generator(fake)) == pytest.approx(1.25)


def test_feature_distance_is_relative_and_skips_the_verdict():
    real = [[torch.tensor([2.0, -2.0]), torch.tensor([100.0])]]
    fake = [[torch.tensor([1.0, -2.0]), torch.tensor([-100.0])]]
    assert float(feature_distance(real, fake=fake)) == pytest.approx(0.25)


def test_every_judge_sees_both_parts_of_the_spectrum_and_every_parameter_learns():
    judges = Discriminators()
    real, fake = judges(noise(4)), judges(noise(5))
    assert len(real) == 3
    # Not the hinge of both: its gradient on the last bias cancels exactly while all verdicts are inside the margins.
    hinge_generator(fake).backward()
    for name, parameter in judges.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name
