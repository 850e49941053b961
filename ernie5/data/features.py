"""Frozen tokenizer features of media, computed once and kept.

Encoding a picture or clip costs far more than everything else in the data path, and the tokenizers do not change during
a run. Each medium is encoded by itself, so that what comes out does not depend on its neighbours in a batch.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable

import torch

from ernie5.data.config import DataConfig
from ernie5.data.document import Patches
from ernie5.data.feature_store import FeatureStore, store_folder
from ernie5.data.patches import merge_patches, pad_frames
from ernie5.errors import DataError
from ernie5.tokenizers.audio.mel import speaker_features
from ernie5.tokenizers.bundle import TokenizerBundle
from ernie5.tokenizers.visual.tokenizer import UNTRAINED

FRAMES_PER_GROUP = 4


@dataclasses.dataclass(frozen=True)
class SeenPicture:
    """A picture or clip to be understood: pixels [3, F, H, W] uint8, features [F, A, h, w] fp32."""

    pixels: torch.Tensor
    features: torch.Tensor


@dataclasses.dataclass(frozen=True)
class DrawnPicture:
    """A picture or clip to be drawn: latents [d, f, h, w] fp32 before quantisation."""

    latents: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Speech:
    """Sound: codes [n, Q] int64 of the levels in use, speaker [160] fp32."""

    codes: torch.Tensor
    speaker: torch.Tensor


Features = SeenPicture | DrawnPicture | Speech
KINDS: dict[str, type[Features]] = {"see": SeenPicture, "draw": DrawnPicture, "hear": Speech}


class FeatureCache:
    """Features by (sample, purpose), the least recently used ones dropped beyond `max_bytes`; behind it, where there is
    one, a store on disk that other processes share. Safe for threads."""

    def __init__(self, max_bytes: int, *, store: FeatureStore | None = None) -> None:
        self._max_bytes, self._store = max_bytes, store
        self._bytes = 0
        self._items: collections.OrderedDict[tuple[str, str], Features] = collections.OrderedDict()
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get(
        self, key: str, *, purpose: str, compute: Callable[[], Features], content: bytes | None = None
    ) -> Features:
        """The features of `key` for `purpose` (see, draw or hear), computed where they are not kept. content: the
        encoded medium, where the store may keep what is made of it."""
        with self._lock:
            found = self._items.get((key, purpose))
            if found is not None:
                self._items.move_to_end((key, purpose))
                self.hits += 1
                return found
            self.misses += 1
        made = self._stored(content, purpose=purpose, compute=compute) if content is not None else compute()
        with self._lock:
            if (key, purpose) not in self._items:
                self._items[(key, purpose)] = made
                self._bytes += _size(made)
            while self._bytes > self._max_bytes:
                self._bytes -= _size(self._items.popitem(last=False)[1])
        return made


    def _stored(self, content: bytes, *, purpose: str, compute: Callable[[], Features]) -> Features:
        if self._store is None:
            return compute()
        kind, key = KINDS[purpose], self._store.key_of(content, purpose=purpose)
        found = self._store.read(key)
        if found is not None:
            return kind(*found)
        made = compute()
        self._store.write(key, [getattr(made, field.name) for field in dataclasses.fields(kind)])
        return made


def open_store(config: DataConfig, *, tokenizers: TokenizerBundle) -> FeatureStore | None:
    """The store that data.feature_cache names; none for tokenizers without an identity, or on a device whose rounding
    is its own. Its context is all that features depend on besides the medium."""
    folder, identities = store_folder(config.feature_cache), tokenizers.identities
    device = next(tokenizers.visual.parameters()).device.type
    if folder is None or device != "cpu" or UNTRAINED in (identities.visual, identities.audio):
        return None
    sizes = (config.image_pixels, config.video_pixels, config.video_frames, tokenizers.audio_levels)
    build = (torch.__version__, torch.backends.cpu.get_cpu_capability())
    context = repr((identities.visual, identities.audio, sizes, build))
    return FeatureStore(folder, max_bytes=config.feature_cache_megabytes << 20, context=context)


class MediaEncoder:
    """Decoded media to features, through the frozen tokenizers. Inputs as data/decode.py returns them."""

    def __init__(self, tokenizers: TokenizerBundle) -> None:
        self._visual = tokenizers.visual
        self._audio = tokenizers.audio
        self._levels = tokenizers.audio_levels

    @torch.no_grad()
    def see(self, video: torch.Tensor, *, is_video: bool) -> SeenPicture:
        """Encode video [3, F, H, W] fp32 in [-1, 1] frame by frame; clips, of one frame too, are first padded to 4n."""
        if is_video:
            video = pad_frames(video, multiple=FRAMES_PER_GROUP)
        features = self._visual.encode_frames(video.movedim(1, 0)).contiguous()
        return SeenPicture(((video + 1.0) * 127.5).round().to(torch.uint8), features)

    @torch.no_grad()
    def draw(self, video: torch.Tensor) -> DrawnPicture:
        """Encode video [3, F, H, W] fp32 in [-1, 1], F = 1+4n, through the causal encoder."""
        return DrawnPicture(self._visual.to_latents(self._visual.encode_features(video[None]))[0].contiguous())

    @torch.no_grad()
    def project(self, seen: SeenPicture) -> DrawnPicture:
        """Latents of a picture of one frame from its features; equal to `draw` of the same pixels."""
        return DrawnPicture(self._visual.to_latents(seen.features.movedim(0, 1)[None])[0].contiguous())

    @torch.no_grad()
    def hear(self, waveform: torch.Tensor) -> Speech:
        """Encode waveform [samples] fp32 at 16 kHz. Raises DataError for an empty one."""
        if not waveform.numel():
            raise DataError("the sound is empty, so it has no codes.")
        codes = self._audio.encode(waveform[None])[0, :, : self._levels]
        return Speech(codes.contiguous(), speaker_features(waveform[None])[0])


def patches_of(seen: SeenPicture) -> Patches:
    """Understanding positions of a picture (one frame) or a clip (groups of four frames)."""
    frames = seen.pixels.shape[1]
    return merge_patches(seen.pixels, features=seen.features, frames_per_group=FRAMES_PER_GROUP if frames > 1 else 1)


def _size(features: Features) -> int:
    tensors = [getattr(features, field.name) for field in dataclasses.fields(features)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
