"""Decode pictures, clips and speech to tensors; the only place of the data path that knows the media libraries.

All functions raise DataError that names the sample, never a library's own exception.
"""

from __future__ import annotations

import dataclasses
import io
import types

import av
import numpy as np
import soundfile
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from ernie5.errors import DataError

SAMPLE_RATE = 16_000
WHITE = (255, 255, 255)
CENTRE = (0.5, 0.5)
# EXIF's orientation -> what sets the picture upright; 1 is upright. Cameras turn the note, not the pixels.
UPRIGHT = types.MappingProxyType({
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
})


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What `data build` must know before it accepts a file: seconds (audio, video) and frames (video)."""

    seconds: float | None = None
    frames: int | None = None


def decode_image(
    data: bytes, *, pixels: int, name: str = "?", background: tuple[int, int, int] = WHITE, crop: tuple = CENTRE
) -> torch.Tensor:
    """A picture as [3, pixels, pixels] fp32 in [-1, 1], upright as its EXIF orientation says.

    Transparency is laid over `background` (RGB 0..255). The picture is resized (antialiased) until its shorter side
    has `pixels`, and a square is cut out; `crop` (x, y) in 0..1 says where. Raises DataError naming `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = _flatten(opened, background=background)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"sample {name}: the picture cannot be decoded ({_reason(error)}).") from error
    return _to_tensor(_fit_square(image, pixels=pixels, crop=crop))


def decode_video(
    data: bytes, *, pixels: int, frames: int = 17, name: str = "?", crop: tuple = CENTRE
) -> torch.Tensor:
    """A clip as [3, frames, pixels, pixels] fp32 in [-1, 1]: its first frames, the last one repeated if it is short.

    Each frame is turned as its container says, resized and cut like a picture. Raises DataError naming `name`.
    """
    decoded: list[torch.Tensor] = []
    try:
        with av.open(io.BytesIO(data)) as container:
            for frame in container.decode(video=0):
                upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                image = Image.fromarray(np.ascontiguousarray(upright))
                decoded.append(_to_tensor(_fit_square(image, pixels=pixels, crop=crop)))
                if len(decoded) == frames:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DataError(f"sample {name}: the clip cannot be decoded ({_reason(error)}).") from error
    if not decoded:
        raise DataError(f"sample {name}: the clip holds no frame.")
    decoded += [decoded[-1]] * (frames - len(decoded))
    return torch.stack(decoded, dim=1)


def decode_audio(data: bytes, *, name: str = "?") -> torch.Tensor:
    """Sound as [samples] fp32, mono, 16 kHz, nominally in [-1, 1]. Raises DataError naming `name`."""
    channels, rate = _read_wave(data) or _read_container(data, name=name)
    samples = channels.mean(axis=0)
    if rate != SAMPLE_RATE and len(samples):
        samples = _resample(samples, rate=rate)
    if not len(samples):
        raise DataError(f"sample {name}: the sound is empty.")
    if not np.isfinite(samples).all():
        raise DataError(f"sample {name}: the sound holds values that are not finite.")
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def probe_image(data: bytes, *, name: str) -> MediaInfo:
    """Decode a picture once to prove that it is readable. Raises DataError."""
    decode_image(data, pixels=8, name=name)
    return MediaInfo()


def probe_video(data: bytes, *, name: str, max_frames: int) -> MediaInfo:
    """Decode a clip and count its frames, stopping once there are more than `max_frames`. Raises DataError."""
    frames, rate = 0, 8.0
    try:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or rate)
            for _ in container.decode(stream):
                frames += 1
                if frames > max_frames:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DataError(f"sample {name}: the clip cannot be decoded ({_reason(error)}).") from error
    if frames == 0:
        raise DataError(f"sample {name}: the clip holds no frame.")
    return MediaInfo(seconds=frames / rate, frames=frames)


def probe_audio(data: bytes, *, name: str) -> MediaInfo:
    """Decode a sound and measure it. Raises DataError."""
    return MediaInfo(seconds=len(decode_audio(data, name=name)) / SAMPLE_RATE)


def _reason(error: Exception) -> str:
    """What a media library means, in words: some of their messages say nothing to a user."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not in a known picture format"
    if isinstance(error, IndexError):
        return "the file has no such track"
    if isinstance(error, av.FFmpegError):
        return error.strerror  # the whole message ends in '<none>', the name of a file in memory
    return str(error)


def _flatten(image: Image.Image, *, background: tuple[int, int, int]) -> Image.Image:
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))  # not exif_transpose: it fails on odd EXIF
    image = image if turn is None else image.transpose(turn)
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip these 16 bits to 8, which is white
        image = Image.fromarray((np.clip(np.array(image, dtype=np.int32), 0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def _fit_square(image: Image.Image, *, pixels: int, crop: tuple) -> Image.Image:
    if image.size == (pixels, pixels):
        return image
    side = min(image.size)
    left, top = (crop[0] * (image.width - side), crop[1] * (image.height - side))
    box = (left, top, left + side, top + side)
    return image.resize((pixels, pixels), Image.Resampling.LANCZOS, box=box)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    array = np.array(image, dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _read_wave(data: bytes) -> tuple[np.ndarray, int] | None:
    """([channels, n] fp32, rate) of what soundfile reads (wav, flac, ogg, opus, mp3), else None."""
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return None
    return samples.T, rate


def _read_container(data: bytes, *, name: str) -> tuple[np.ndarray, int]:
    """([channels, n] fp32, rate) of any container with sound."""
    converter = av.AudioResampler(format="fltp")
    pieces, rate = [np.zeros((1, 0), dtype=np.float32)], SAMPLE_RATE
    try:
        with av.open(io.BytesIO(data)) as container:
            for frame in container.decode(audio=0):
                rate = frame.sample_rate
                pieces += [part.to_ndarray().mean(axis=0, keepdims=True) for part in converter.resample(frame)]
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise DataError(f"sample {name}: the sound cannot be decoded ({_reason(error)}).") from error
    return np.concatenate(pieces, axis=1), rate


def _resample(samples: np.ndarray, *, rate: int) -> np.ndarray:
    """[n] fp32 from `rate` to 16 kHz."""
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="fltp", layout="mono")
    frame.sample_rate = rate
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])
