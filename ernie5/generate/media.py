"""Writes pictures, clips and sound to files and to data URIs: PNG, MP4 (H.264), WAV.

Values are fp32: pictures [3, H, W] and clips [3, F, H, W] in [-1, 1], waveforms [samples] in [-1, 1].
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from PIL import Image

from ernie5.errors import DataError, EnvironmentFault
from ernie5.observe.faults import refusal_of
from ernie5.observe.files import replace_file

MIME_TYPES = {".png": "image/png", ".mp4": "video/mp4", ".wav": "audio/wav"}


def to_bytes_image(values: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] -> [H, W, 3] uint8; values outside are clamped."""
    scaled = ((values.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def encode_png(image: torch.Tensor) -> bytes:
    """Return the picture [3, H, W] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(to_bytes_image(image)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def encode_mp4(video: torch.Tensor, *, frames_per_second: int) -> bytes:
    """Return the clip [3, F, H, W] as H.264 in MP4 that browsers play (yuv420p).

    Raises DataError when a side is odd, which 4:2:0 chroma cannot hold.
    """
    height, width = video.shape[2:]
    if height % 2 or width % 2:
        raise DataError(
            f"A clip of {height} x {width} pixels cannot be written as MP4. H.264 with 4:2:0 chroma needs even sides. "
            "Set data.video_pixels to an even number."
        )
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options={"crf": "16", "preset": "fast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(video.shape[1]):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(to_bytes_image(video[:, index]), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def encode_wav(waveform: torch.Tensor, *, sample_rate: int) -> bytes:
    """Return the waveform [samples] as 16-bit PCM WAV."""
    buffer = io.BytesIO()
    samples = waveform.detach().float().cpu().clamp(-1, 1).numpy()
    soundfile.write(buffer, samples, sample_rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def write_file(path: Path, *, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all, making its folder. Raises EnvironmentFault where the machine
    refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content=content)
    except OSError as error:
        refusal = refusal_of(error, place="another --out")
        raise EnvironmentFault(f"Cannot write {path} ({len(content)} bytes): {refusal}.") from error


def data_uri(content: bytes, *, suffix: str) -> str:
    """Return `content` as a data: URI whose type follows the file suffix, so that a page needs no second file."""
    if suffix not in MIME_TYPES:
        raise DataError(f"No media type is known for the suffix {suffix!r}. Known: {', '.join(sorted(MIME_TYPES))}.")
    return f"data:{MIME_TYPES[suffix]};base64,{base64.b64encode(content).decode('ascii')}"
