"""What one sample of the corpus is, as it stands in a shard: a key, a description, and media bytes.

Torch-free. The description is the member `KEY.json`; `parse_meta` reads it strictly, `meta_to_json` writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from ernie5.errors import DataError

TASKS = ("text", "image", "video", "audio", "page")
SPLITS = ("train", "validation")
VALIDATION_PERCENT = 5
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov")
AUDIO_SUFFIXES = ("opus", "ogg", "wav", "flac", "mp3")


@dataclasses.dataclass(frozen=True)
class Caption:
    """A description of a picture or clip in one language (`en`, `zh`, ...)."""

    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Segment:
    """One piece of an interleaved page: either text, or the name of the sample's media member (`0.jpg`)."""

    text: str | None = None
    image: str | None = None


@dataclasses.dataclass(frozen=True)
class SampleMeta:
    """The description of one sample; fields that do not belong to its task are empty.

    text: the document (task text). captions, keywords, group, subgroup, motion: what a picture or clip shows.
    transcript, speaker: what is said, and by whom. segments: the pieces of a page in order. seconds: duration of audio
    or video, frames: frames of a clip, both measured at build. split: overrides the split by key when given.
    """

    task: str
    language: str = "und"
    text: str | None = None
    captions: tuple[Caption, ...] = ()
    keywords: tuple[str, ...] = ()
    group: str | None = None
    subgroup: str | None = None
    motion: str | None = None
    transcript: str | None = None
    speaker: str | None = None
    segments: tuple[Segment, ...] = ()
    seconds: float | None = None
    frames: int | None = None
    source: str | None = None
    split: str | None = None

    def caption(self, language: str) -> str | None:
        """The caption in `language`, or None."""
        return next((caption.text for caption in self.captions if caption.language == language), None)


META_FIELDS = frozenset(field.name for field in dataclasses.fields(SampleMeta))


@dataclasses.dataclass(frozen=True)
class Media:
    """One media member of a sample: its name without the key (`png`, `0.jpg`) and its encoded bytes."""

    name: str
    data: bytes


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample as read from a shard."""

    key: str
    meta: SampleMeta
    media: tuple[Media, ...] = ()

    def find_media(self, name: str) -> Media:
        """The member called `name`. Raises DataError naming the sample when it is missing."""
        for media in self.media:
            if media.name == name:
                return media
        held = ", ".join(media.name for media in self.media) or "none"
        raise DataError(f"sample {self.key} has no media member {name} (it has: {held}). Build the shard again.")


def fitting_captions(captions: tuple[Caption, ...], *, languages: tuple[str, ...]) -> tuple[Caption, ...]:
    """Those that may be drawn: of `languages` (empty: of any); all of them where none is."""
    return tuple(caption for caption in captions if caption.language in languages) or captions


def split_of(key: str) -> str:
    """`train` or `validation` (5 %) from the sample id alone: the first 8 bytes of its sha256, modulo 100."""
    number = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big")
    return "validation" if number % 100 < VALIDATION_PERCENT else "train"


def parse_meta(data: bytes, *, where: str) -> SampleMeta:
    """Read the description of one sample. Raises DataError that begins with `where` when it breaks a rule."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:  # no UTF-8, no json, a number too long, nested too deep
        raise DataError(f"{where}: the sample's json cannot be read ({error}). Build the shard again.") from error
    return meta_from_json(raw, where=where)


def meta_from_json(raw: object, *, where: str) -> SampleMeta:
    """Check a decoded json object and turn it into a SampleMeta. Raises DataError that begins with `where`."""
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: the description must be a json object, not {type(raw).__name__}.")
    values = {name: value for name, value in raw.items() if name in META_FIELDS and value is not None}
    for name in ("language", "text", "group", "subgroup", "motion", "transcript", "speaker", "source", "split"):
        if name in values and not isinstance(values[name], str):
            raise DataError(f"{where}: `{name}` must be a string, not {values[name]!r}.")
    if values.get("task") not in TASKS:
        raise DataError(f"{where}: task is {raw.get('task')!r}; it must be one of {', '.join(TASKS)}.")
    if values.get("split", "train") not in SPLITS:
        raise DataError(f"{where}: split is {values['split']!r}; it must be one of {', '.join(SPLITS)}.")
    if "captions" in values:
        values["captions"] = tuple(_caption(item, where=where) for item in _items(values["captions"], where=where))
    if "segments" in values:
        values["segments"] = tuple(_segment(item, where=where) for item in _items(values["segments"], where=where))
    if "keywords" in values:
        values["keywords"] = tuple(str(item) for item in _items(values["keywords"], where=where))
    _check_complete(values, where=where)
    return SampleMeta(**values)


def _check_complete(values: dict, *, where: str) -> None:
    if values["task"] == "text" and not values.get("text"):
        raise DataError(f"{where}: a text sample needs a `text` that is not empty.")
    if values["task"] == "page" and not values.get("segments"):
        raise DataError(f"{where}: a page needs `segments`, a list of {{\"text\": ...}} and {{\"image\": ...}}.")
    for name, kind in (("seconds", (int, float)), ("frames", int)):
        value = values.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) or value < 0):
            raise DataError(f"{where}: `{name}` must be a number that is not negative, not {value!r}.")


def _items(value: object, *, where: str) -> list:
    if not isinstance(value, list):
        raise DataError(f"{where}: captions, keywords and segments must be lists, not {value!r}.")
    return value


def _caption(item: object, *, where: str) -> Caption:
    if isinstance(item, str):
        return Caption("und", item)
    if not isinstance(item, Mapping) or not isinstance(item.get("text"), str):
        raise DataError(f'{where}: a caption must be {{"language": "en", "text": "..."}}, not {item!r}.')
    return Caption(str(item.get("language", "und")), item["text"])


def _segment(item: object, *, where: str) -> Segment:
    if isinstance(item, Mapping) and len(item) == 1:
        (name, value), *_ = item.items()
        if name in ("text", "image") and isinstance(value, str):
            return Segment(**{name: value})
    raise DataError(f'{where}: a segment must be {{"text": "..."}} or {{"image": "0.jpg"}}, not {item!r}.')


def meta_to_json(meta: SampleMeta) -> bytes:
    """The description as compact UTF-8 json, empty fields left out, keys in the order of the dataclass."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(meta):
        value = getattr(meta, field.name)
        if value is None or value == ():
            continue
        if field.name == "captions":
            value = [dataclasses.asdict(caption) for caption in meta.captions]
        elif field.name == "segments":
            value = [{"text": s.text} if s.image is None else {"image": s.image} for s in meta.segments]
        values[field.name] = value
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
