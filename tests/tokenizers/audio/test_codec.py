"""Encoder, decoder and inverse transform: exactness, shapes, gradients everywhere."""

import pytest
import torch

from ernie5.tokenizers.audio.codec import Block, Decoder, Encoder, InverseSpectrum, Lengthen, Shorten
from ernie5.tokenizers.audio.mel import short_time_spectrum
from ernie5.tokenizers.config import AudioTokenizerConfig

SMALL = AudioTokenizerConfig(
    code_width=8, mel_bands=20, encoder_widths=(16, 16, 16), encoder_depths=(1, 0, 1), decoder_widths=(16, 16, 16),
    decoder_depths=(1, 0, 1),
)


@pytest.mark.parametrize("fft_size, hop", [(640, 160), (512, 128), (640, 320)])
def test_the_inverse_transform_undoes_the_short_time_spectrum(fft_size, hop):
    waveform = torch.randn(2, 20 * hop, generator=torch.Generator().manual_seed(0))
    window = torch.hann_window(fft_size)
    spectrum = short_time_spectrum(waveform, fft_size=fft_size, hop=hop, window=window) * window.sum()
    back = InverseSpectrum(fft_size, hop=hop)(spectrum.transpose(1, 2))
    assert back.shape == waveform.shape
    # Frames that would start before the signal do not exist, so the outermost half window is not determined.
    inner = slice(fft_size // 2, -fft_size // 2)
    torch.testing.assert_close(back[:, inner], waveform[:, inner], atol=1e-5, rtol=0)


def test_shortening_joins_neighbours_and_lengthening_has_the_inverse_shape():
    hidden = torch.randn(2, 12, 6)
    short = Shorten(6, width=10, factor=4)(hidden)
    assert short.shape == (2, 3, 10)
    assert Lengthen(10, width=6, factor=4)(short).shape == hidden.shape


def test_a_position_of_the_shortened_sequence_depends_on_its_own_frames_only():
    shorten = Shorten(6, width=10, factor=4)
    hidden = torch.randn(1, 12, 6)
    changed = hidden.clone()
    changed[:, 4:8] += 1.0 * torch.randn(1, 4, 6)
    difference = (shorten(changed) - shorten(hidden)).abs().amax((0, 2))
    assert difference[1] > 0 and difference[0] == 0 and difference[2] == 0


def test_a_block_starts_near_the_identity():
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 16)
    with torch.no_grad():
        assert float((Block(16, expansion=3)(hidden) - hidden).abs().mean()) < 0.1


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_encoder_and_decoder_agree_on_1280_samples_per_frame(frames):
    latents = Encoder(SMALL)(torch.randn(2, 1280 * frames))
    assert latents.shape == (2, frames, 8)
    assert Decoder(SMALL)(latents).shape == (2, 1280 * frames)


def test_every_parameter_of_encoder_and_decoder_gets_a_gradient():
    torch.manual_seed(0)
    encoder, decoder = Encoder(SMALL), Decoder(SMALL)
    decoder(encoder(0.1 * torch.randn(2, 1280 * 3))).square().sum().backward()
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_rows_of_a_batch_do_not_mix():
    encoder, decoder = Encoder(SMALL).eval(), Decoder(SMALL).eval()
    waveform = 0.1 * torch.randn(3, 2560)
    with torch.no_grad():
        together = decoder(encoder(waveform))
        alone = torch.cat([decoder(encoder(row[None])) for row in waveform])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_huge_latents_stay_finite():
    assert torch.isfinite(Decoder(SMALL)(torch.full((1, 2, 8), 1e4))).all()
