"""Decoding pictures, clips and sound to tensors, and refusing what is broken."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ernie5.data.decode import decode_audio, decode_image, decode_video, probe_audio, probe_video
from ernie5.errors import DataError


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_mode_become_three_channels(mode: str) -> None:
    image = Image.new(mode, (9, 7))
    pixels = decode_image(encode(image, "TIFF" if mode in ("CMYK", "I;16") else "PNG"), pixels=8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
    assert -1.0 <= float(pixels.min()) <= float(pixels.max()) <= 1.0


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pixels = decode_image(encode(Image.fromarray(array)), pixels=16)
    assert np.array_equal(((pixels.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8), array)


def test_transparency_shows_the_background() -> None:
    data = encode(Image.new("RGBA", (4, 4), (200, 10, 10, 0)))
    assert torch.equal(decode_image(data, pixels=4), torch.ones(3, 4, 4))
    assert torch.equal(decode_image(data, pixels=4, background=(0, 0, 0)), -torch.ones(3, 4, 4))


def test_the_crop_chooses_the_part_of_a_wide_picture() -> None:
    image = Image.new("RGB", (16, 4), "black")
    image.paste("white", (12, 0, 16, 4))
    data = encode(image)
    assert decode_image(data, pixels=4, crop=(1.0, 0.5)).min() == 1.0
    assert decode_image(data, pixels=4, crop=(0.0, 0.5)).max() == -1.0


def test_a_short_clip_repeats_its_last_frame(tmp_path: Path, media_writers: tuple) -> None:
    data = media_writers[1](tmp_path / "a.mp4", frames=5).read_bytes()
    video = decode_video(data, pixels=16, frames=9)
    assert video.shape == (3, 9, 16, 16)
    assert torch.equal(video[:, 4], video[:, 8]) and not torch.equal(video[:, 3], video[:, 4])
    assert torch.equal(decode_video(data, pixels=16, frames=3), video[:, :3])


def test_frames_and_seconds_are_measured(tmp_path: Path, media_writers: tuple) -> None:
    _, write_clip, write_tone = media_writers
    info = probe_video(write_clip(tmp_path / "a.mp4", frames=5).read_bytes(), name="a", max_frames=17)
    assert (info.frames, info.seconds) == (5, 0.625)
    tone = write_tone(tmp_path / "a.wav", seconds=0.25).read_bytes()
    assert probe_audio(tone, name="a").seconds == 0.25


@pytest.mark.parametrize(("rate", "channels", "suffix"), [(16_000, 1, "flac"), (44_100, 2, "wav"), (8_000, 1, "ogg")])
def test_sound_of_any_rate_becomes_16_khz_mono(
    tmp_path: Path, media_writers: tuple, rate: int, channels: int, suffix: str
) -> None:
    path = media_writers[2](tmp_path / f"a.{suffix}", seconds=0.5, rate=rate, channels=channels)
    samples = decode_audio(path.read_bytes())
    assert samples.dtype == torch.float32 and abs(len(samples) - 8000) < 80
    spectrum = np.abs(np.fft.rfft(samples.numpy()[2000:6000]))
    assert abs(int(spectrum.argmax()) * 16_000 / 4000 - 440) <= 4
    assert 0.4 < float(samples.abs().max()) < 0.6


@pytest.mark.parametrize("data", [b"", b"rubbish", b"RIFF\0\0\0\0WAVE"])
def test_undecodable_media_name_their_sample(data: bytes) -> None:
    for decode in (
        lambda: decode_image(data, pixels=8, name="k7"),
        lambda: decode_video(data, pixels=8, name="k7"),
        lambda: decode_audio(data, name="k7"),
    ):
        with pytest.raises(DataError, match="sample k7"):
            decode()


def test_truncated_media_are_refused(tmp_path: Path, media_writers: tuple) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encode(Image.fromarray(noise), kind)
        with pytest.raises(DataError, match="sample k"):
            decode_image(data[: len(data) // 2], pixels=8, name="k")
    clip = media_writers[1](tmp_path / "a.mp4", frames=5).read_bytes()
    with pytest.raises(DataError, match="sample k"):
        decode_video(clip[: len(clip) // 2], pixels=8, name="k")


def test_sound_that_is_empty_or_not_finite_is_refused(tmp_path: Path) -> None:
    import soundfile

    for samples in (np.zeros(0, dtype=np.float32), np.full(100, np.nan, dtype=np.float32)):
        soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
        with pytest.raises(DataError, match="sample k"):
            decode_audio((tmp_path / "a.wav").read_bytes(), name="k")


def test_a_sound_is_no_clip_and_a_picture_no_sound(tmp_path: Path, media_writers: tuple) -> None:
    tone = media_writers[2](tmp_path / "a.wav").read_bytes()
    with pytest.raises(DataError):
        decode_video(tone, pixels=8)
    with pytest.raises(DataError):
        decode_audio(encode(Image.new("RGB", (4, 4))))


def test_what_no_library_can_name_is_said_in_words() -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, format="PNG")
    with pytest.raises(DataError, match="not in a known picture format"):
        decode_image(b"some text", pixels=8, name="a.png")
    with pytest.raises(DataError, match=r"\(Invalid data found when processing input\)\.$"):
        decode_video(b"some text", pixels=8, name="a.mp4")
    with pytest.raises(DataError, match="no such track"):
        decode_audio(picture.getvalue(), name="a.wav")


def corners(pixels: torch.Tensor) -> str:
    """The colours of [3, n, n], clockwise from the top left."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 0): "y"}
    last = pixels.shape[-1] - 2
    places = ((1, 1), (1, last), (last, last), (last, 1))
    return "".join(names[tuple((pixels[:, y, x] > 0).int().tolist())] for y, x in places)


def four_colours() -> np.ndarray:
    """[48, 64, 3] uint8: red, green, blue, yellow, clockwise from the top left."""
    array = np.zeros((48, 64, 3), np.uint8)
    array[:24, :32], array[:24, 32:], array[24:, 32:], array[24:, :32] = (
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    )
    return array


@pytest.mark.parametrize(
    ("orientation", "seen"),
    enumerate(("rgby", "gryb", "byrg", "ybgr", "rybg", "yrgb", "bgry", "gbyr", "rgby"), start=1),
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_stands_upright_as_its_exif_says(orientation: int, seen: str, kind: str) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    out = io.BytesIO()
    Image.fromarray(four_colours()).save(out, kind, exif=exif)
    assert corners(decode_image(out.getvalue(), pixels=16)) == seen


@pytest.mark.parametrize(
    ("matrix", "seen"),
    [((1, 0, 0, 1), "rgby"), ((0, 1, -1, 0), "yrgb"), ((-1, 0, 0, -1), "byrg"), ((0, -1, 1, 0), "gbyr")],
)
def test_a_clip_stands_upright_as_its_container_says(tmp_path: Path, matrix: tuple, seen: str) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(four_colours(), format="rgb24")))
        container.mux(stream.encode())
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.find(b"tkhd") + 44  # version and flags, times, ids, layer and volume stand before the matrix
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video = decode_video(bytes(data), pixels=16, frames=1)
    assert corners(video[:, 0]) == seen


@pytest.mark.parametrize(("dtype", "kind"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF")])
def test_grey_of_16_bits_keeps_its_shades(dtype: type, kind: str) -> None:
    shades = np.array([[0, 257 * 64], [257 * 128, 65535]]).astype(dtype)
    pixels = decode_image(encode(Image.fromarray(shades), kind), pixels=2)
    assert ((pixels[0] + 1) * 127.5).round().tolist() == [[0, 64], [128, 255]]
