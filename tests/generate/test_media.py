"""Media files survive the way to disk and back."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from ernie5.errors import DataError, EnvironmentFault
from ernie5.generate import media


def test_a_png_gives_back_every_pixel() -> None:
    image = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    back = np.asarray(Image.open(io.BytesIO(media.encode_png(image))))
    assert back.shape == (5, 7, 3)
    assert np.array_equal(back, ((image.permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(np.uint8))


def test_values_outside_the_range_are_clamped_not_wrapped() -> None:
    assert media.to_bytes_image(torch.tensor([-9.0, 0.0, 9.0]).view(3, 1, 1)).ravel().tolist() == [0, 128, 255]


def test_an_mp4_keeps_its_frames_and_speed() -> None:
    ramp = torch.linspace(-0.8, 0.8, 17).view(1, 17, 1, 1).expand(3, 17, 32, 32)
    with av.open(io.BytesIO(media.encode_mp4(ramp, frames_per_second=8))) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264" and stream.average_rate == 8
    assert len(frames) == 17 and frames[0].shape == (32, 32, 3)
    # H.264 at crf 16 is near but not lossless: two grey levels of 255.
    for index, frame in enumerate(frames):
        assert abs(frame.mean() - (float(ramp[0, index, 0, 0]) + 1) * 127.5) < 2.0


def test_odd_sides_are_refused_with_the_way_out() -> None:
    with pytest.raises(DataError, match="even"):
        media.encode_mp4(torch.zeros(3, 1, 31, 32), frames_per_second=8)


def test_a_wav_keeps_its_samples_and_rate() -> None:
    wave = torch.sin(torch.arange(1600) / 7.0) * 0.5
    back, rate = soundfile.read(io.BytesIO(media.encode_wav(wave, sample_rate=16000)))
    assert rate == 16000 and np.abs(back - wave.numpy()).max() < 1 / 32768 + 1e-6


def test_a_folder_that_is_a_file_is_the_machine_s_fault(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(EnvironmentFault, match="Cannot write"):
        media.write_file(tmp_path / "taken" / "out.png", content=b"x")


def test_a_data_uri_names_its_type_and_refuses_unknown_ones() -> None:
    assert media.data_uri(b"a", suffix=".png") == "data:image/png;base64,YQ=="
    with pytest.raises(DataError, match=".exe"):
        media.data_uri(b"a", suffix=".exe")
