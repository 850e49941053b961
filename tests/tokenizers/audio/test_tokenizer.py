"""The audio tokenizer as its users see it: any length, any number of levels, files, and the embedded codec."""

import math

import pytest
import torch

from ernie5.errors import ConfigError, TokenizerError
from ernie5.tokenizers.audio.quality import log_mel_distance
from ernie5.tokenizers.audio.tokenizer import AudioTokenizer, load_audio_tokenizer, save_audio_tokenizer
from ernie5.tokenizers.config import AudioTokenizerConfig
from ernie5.tokenizers.weights import EMBEDDED, FILE_NAME

SMALL = AudioTokenizerConfig(
    levels=3, codes=16, code_width=8, mel_bands=20, encoder_widths=(16, 16, 16), encoder_depths=(0, 1, 0),
    decoder_widths=(16, 16, 16), decoder_depths=(0, 1, 0), level_shares=(0.2, 0.3, 0.5),
)
needs_embedded = pytest.mark.skipif(
    not (EMBEDDED / "audio" / FILE_NAME).is_file(), reason="the embedded audio codec is not there yet"
)


@pytest.fixture
def tokenizer() -> AudioTokenizer:
    torch.manual_seed(0)
    made = AudioTokenizer(SMALL).eval()
    made.quantizer.codebooks.normal_()
    return made


@pytest.mark.parametrize("hertz", [8_000, 24_000])
def test_a_rate_that_sound_is_not_decoded_to_is_refused(hertz):
    """Decoding gives 16 kHz whatever the codec says, so a second of speech at 24 kHz would come back in 0.67 s."""
    with pytest.raises(ConfigError, match="use 16000"):
        AudioTokenizerConfig(sample_rate=hertz)


@pytest.mark.parametrize("samples", [1, 63, 1279, 1280, 1281, 5000])
def test_any_length_is_coded_in_frames_rounded_up(tokenizer, samples):
    codes = tokenizer.encode(0.1 * torch.randn(2, samples))
    frames = -(-samples // 1280)
    assert codes.shape == (2, frames, 3) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < 16
    waveform = tokenizer.decode(codes)
    assert waveform.shape == (2, 1280 * frames)
    assert float(waveform.abs().max()) <= 1.0


def test_a_clip_that_ends_inside_a_frame_is_coded_as_if_silence_followed(tokenizer):
    waveform = 0.1 * torch.randn(1, 3000)
    padded = torch.cat([waveform, torch.zeros(1, 3 * 1280 - 3000)], dim=1)
    torch.testing.assert_close(tokenizer.encode(waveform), tokenizer.encode(padded))


@pytest.mark.parametrize("num_levels", [1, 2, 3])
def test_every_number_of_first_levels_decodes(tokenizer, num_levels):
    codes = tokenizer.encode(0.1 * torch.randn(1, 4000))
    assert torch.isfinite(tokenizer.decode(codes[:, :, :num_levels])).all()


@pytest.mark.parametrize("shape", [(1, 0), (0, 1280), (1280,), (1, 1, 1280)])
def test_waveforms_without_samples_or_of_another_rank_are_refused(tokenizer, shape):
    with pytest.raises(TokenizerError, match="audio codes"):
        tokenizer.encode(torch.zeros(shape))


def test_infinite_samples_are_refused(tokenizer):
    with pytest.raises(TokenizerError, match="NaN or infinite"):
        tokenizer.encode(torch.full((1, 1280), float("inf")))


def test_no_frames_and_end_codes_are_refused_in_decoding(tokenizer):
    with pytest.raises(TokenizerError, match="no frames"):
        tokenizer.decode(torch.zeros(1, 0, 3, dtype=torch.long))
    with pytest.raises(TokenizerError, match="end codes"):
        tokenizer.decode(torch.full((1, 2, 3), 16))


def test_a_saved_codec_comes_back_with_its_config_its_codes_and_an_identity(tokenizer, tmp_path):
    path = save_audio_tokenizer(tokenizer, directory=tmp_path, dtype=torch.float32)
    back = load_audio_tokenizer(tmp_path)
    waveform = 0.1 * torch.randn(1, 4000)
    assert back.config == SMALL and not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())
    torch.testing.assert_close(back.encode(waveform), tokenizer.encode(waveform))
    assert back.identity == load_audio_tokenizer(path).identity != tokenizer.identity


def test_a_file_of_other_widths_or_no_file_is_refused(tokenizer, tmp_path):
    with pytest.raises(TokenizerError, match="no audio tokenizer"):
        load_audio_tokenizer(tmp_path / "nowhere")
    other = AudioTokenizer(AudioTokenizerConfig(**{**vars(SMALL), "code_width": 9}))
    other.config = SMALL
    save_audio_tokenizer(other, directory=tmp_path)
    with pytest.raises(TokenizerError, match="differ in name or shape"):
        load_audio_tokenizer(tmp_path)


@needs_embedded
def test_the_embedded_codec_is_small_and_more_levels_bring_it_nearer_to_a_vowel():
    codec = load_audio_tokenizer("embedded")
    assert (EMBEDDED / "audio" / FILE_NAME).stat().st_size <= 8_000_000
    assert (codec.levels, codec.codes, codec.sample_rate, codec.samples_per_frame) == (8, 1024, 16_000, 1280)
    time = torch.arange(16_000) / 16_000
    # A buzz of 130 Hz through formants at 700 and 1200 Hz: a rough "a".
    vowel = sum(
        torch.sin(2 * math.pi * 130 * k * time) / (1 + ((130 * k - 700) / 150) ** 2)
        + torch.sin(2 * math.pi * 130 * k * time) / (2 + ((130 * k - 1200) / 200) ** 2)
        for k in range(1, 30)
    )[None]
    vowel = 0.3 * vowel / vowel.abs().max()
    codes = codec.encode(vowel)
    distances = [float(log_mel_distance(codec.decode(codes[:, :, :q])[:, :16_000], target=vowel)) for q in (1, 4, 8)]
    silence = float(log_mel_distance(torch.zeros_like(vowel), target=vowel))
    # A steady artificial vowel is far from the training speech; near is still much nearer than nothing.
    assert max(distances) < 0.5 * silence
