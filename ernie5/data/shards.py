"""Shards: list them, index them, read samples at random, write them. The only place that knows WebDataset.

A shard is a WebDataset tar: the members of one sample share the name up to the first dot (its key) and stand side by
side. `.tar` is read by offset; `.tar.gz` and `.tar.xz` are unpacked into memory once, so keep those small.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ernie5.data.archive import scan_tar
from ernie5.data.samples import (
    SPLITS,
    TASKS,
    Caption,
    Media,
    Sample,
    SampleMeta,
    Segment,
    meta_to_json,
    parse_meta,
    split_of,
)
from ernie5.errors import DataError, EnvironmentFault

__all__ = [
    "Caption",
    "Corpus",
    "Media",
    "Sample",
    "SampleMeta",
    "SampleRef",
    "Segment",
    "ShardWriter",
    "list_shards",
    "open_corpus",
    "split_of",
]
SAMPLE_FOLDER = Path(__file__).parent / "sample"
SUFFIXES = (".tar", ".tar.gz", ".tar.xz")
COMPRESSIONS = {"none": ".tar", "gzip": ".tar.gz", "xz": ".tar.xz"}


@dataclasses.dataclass(frozen=True)
class Member:
    """Where one file of a sample lies in the (unpacked) tar: name without the key, byte offset and size."""

    name: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class SampleRef:
    """The address of one sample and what a mixture needs to know about it without reading it again.

    shard: index into `Corpus.shards`; num_bytes: of all its members; seconds: of audio or video, when known;
    characters: of a text document.
    """

    key: str
    task: str
    language: str
    split: str
    shard: int
    members: tuple[Member, ...]
    seconds: float | None = None
    characters: int = 0

    @property
    def num_bytes(self) -> int:
        return sum(member.size for member in self.members)


def list_shards(patterns: tuple[str, ...] | list[str] | str) -> tuple[Path, ...]:
    """Resolve paths, globs, folders (all shards directly inside) and the word `sample` (the embedded corpus).

    Sorted, without duplicates. Raises DataError when the list is empty or a pattern matches nothing.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not patterns:
        raise DataError("the list of shards is empty. Name paths, globs or folders of .tar files, or the word sample.")
    found: set[Path] = set()
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise DataError(
                f"no shard matches {pattern}. A shard ends in {', '.join(SUFFIXES)}; "
                f"build some with `ernie5 data build SRC --out DIR`, or use the word sample."
            )
        found.update(matches)
    return tuple(sorted(found))


def _matches(pattern: str) -> list[Path]:
    folder = SAMPLE_FOLDER if str(pattern) == "sample" else Path(pattern)
    if folder.is_dir():
        return [path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.is_file()]
    return [Path(path) for path in glob.glob(str(pattern), recursive=True) if Path(path).is_file()]


def open_corpus(shards: tuple[Path, ...], *, split: str | None = None) -> Corpus:
    """Index `shards` (headers and descriptions are read, media are skipped) and keep the samples of `split`.

    `split` is `train`, `validation` or None for all. Raises DataError for a damaged shard, a sample without json, a
    key that occurs twice, or an empty result.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}.")
    if not shards:
        raise DataError("the list of shards is empty; there is nothing to open.")
    owners: dict[str, int] = {}
    refs, elsewhere = [], set()
    for index, path in enumerate(shards):
        for ref in _index_shard(path, index=index):
            if ref.key in owners:
                first = shards[owners[ref.key]]
                raise DataError(f"sample key {ref.key} occurs twice: in {first} and in {path}. Keys must be unique.")
            owners[ref.key] = index
            if split is None or ref.split == split:
                refs.append(ref)
            else:
                elsewhere.add(ref.task)
    if not refs:
        raise DataError(_no_sample(split if elsewhere else None, shards=shards))
    return Corpus(shards, refs=tuple(sorted(refs, key=lambda ref: ref.key)), elsewhere=frozenset(elsewhere))


def _no_sample(split: str | None, *, shards: tuple[Path, ...]) -> str:
    where = f"in {len(shards)} shard(s), first {shards[0]}"
    if split is None:
        return f"no sample {where}. Add shards or samples."
    return (
        f"no sample for {split} {where}: all are of the other split. 5 % by their keys are validation, unless their "
        f'json says "split": "{split}". Write that into some and build again, or add shards.'
    )


class Corpus:
    """Random access to the samples of some shards. Pickles as paths and addresses; files open on first use.

    elsewhere: the tasks of the samples that are in these shards and not in `refs`, being of the other split.
    """

    def __init__(
        self, shards: tuple[Path, ...], *, refs: tuple[SampleRef, ...], elsewhere: frozenset[str] = frozenset()
    ) -> None:
        self.shards = shards
        self.refs = refs
        self.elsewhere = elsewhere
        self._by_task = {task: tuple(ref for ref in refs if ref.task == task) for task in TASKS}
        self._opened: dict[int, BinaryIO] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self.refs)

    def __getstate__(self) -> dict[str, object]:
        return {"shards": self.shards, "refs": self.refs, "elsewhere": self.elsewhere}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["shards"], refs=state["refs"], elsewhere=state["elsewhere"])

    def tasks(self) -> tuple[str, ...]:
        """The tasks that have at least one sample."""
        return tuple(task for task, refs in self._by_task.items() if refs)

    def samples(self, task: str) -> tuple[SampleRef, ...]:
        """The samples of one task, sorted by key; empty when there are none."""
        return self._by_task[task]

    def read(self, ref: SampleRef) -> Sample:
        """Read one sample. Raises DataError when the shard ends too early or its description is broken."""
        where = f"{self.shards[ref.shard]}: sample {ref.key}"
        meta, media = None, []
        for member in ref.members:
            data = self._read(ref.shard, member=member, where=where)
            if member.name == "json":
                meta = parse_meta(data, where=where)
            else:
                media.append(Media(member.name, data))
        if meta is None:
            raise DataError(f"{where} has no json member. Build the shard again.")
        return Sample(ref.key, meta, tuple(media))

    def _read(self, shard: int, *, member: Member, where: str) -> bytes:
        if self._owner != os.getpid():  # a forked worker would share the parent's file position
            self._opened, self._owner = {}, os.getpid()
        if shard not in self._opened:
            self._opened[shard] = _open_tar(self.shards[shard])
        stream = self._opened[shard]
        stream.seek(member.offset)
        data = stream.read(member.size)
        if len(data) != member.size:
            raise DataError(f"{where}: the shard ends inside member {member.name}; copy or build it again.")
        return data


def _open_tar(path: Path) -> BinaryIO:
    try:
        if path.name.endswith(".gz"):
            return io.BytesIO(gzip.decompress(path.read_bytes()))
        if path.name.endswith(".xz"):
            return io.BytesIO(lzma.decompress(path.read_bytes()))
        return path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"shard {path} does not exist.") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:  # of the system; gzip's own complaints have no number
            reason = f"{error.strerror}. Look at the disk and at permissions"
            raise EnvironmentFault(f"shard {path} cannot be read: {reason}.") from error
        raise DataError(f"shard {path} cannot be read ({error}). It is truncated or damaged; build it anew.") from error


def _index_shard(path: Path, *, index: int) -> Iterator[SampleRef]:
    with _open_tar(path) as stream:
        members: dict[str, list[Member]] = {}
        try:
            for name, offset, size in scan_tar(stream):
                key, member = _split_name(name)
                if key:
                    members.setdefault(key, []).append(Member(member, offset, size))
        except ValueError as error:
            raise DataError(f"shard {path} is not a whole tar file ({error}). Copy or build it again.") from error
        for key, parts in members.items():
            yield _make_ref(stream, key=key, members=tuple(parts), path=path, index=index)


def _split_name(path: str) -> tuple[str, str]:
    """(key, member name) by WebDataset's rule: the path up to the first dot of the file name; "" for hidden files."""
    folder, slash, name = path.rpartition("/")
    stem, _, suffix = name.partition(".")
    return folder + slash + stem if stem else "", suffix.lower()


def _make_ref(stream: BinaryIO, *, key: str, members: tuple[Member, ...], path: Path, index: int) -> SampleRef:
    where = f"{path}: sample {key}"
    described = [member for member in members if member.name == "json"]
    if len(described) != 1:
        held = ", ".join(f".{member.name}" for member in members)
        raise DataError(f"{where} has {len(described)} json members; it needs exactly one beside its media ({held}).")
    stream.seek(described[0].offset)
    meta = parse_meta(stream.read(described[0].size), where=where)
    split = meta.split or split_of(key)
    characters = len(meta.text or "") + sum(len(segment.text or "") for segment in meta.segments)
    return SampleRef(key, meta.task, meta.language, split, index, members, meta.seconds, characters)


class ShardWriter:
    """Write samples into numbered shards PREFIX-000000.tar..., each at most `max_bytes` of members; repeatable bytes.

    Use as a context manager; `paths` lists what was written.
    """

    def __init__(self, folder: Path, *, prefix: str, max_bytes: int, compression: str = "none") -> None:
        self.folder = folder
        self.prefix = prefix
        self.max_bytes = max_bytes
        self.compression = compression
        self.paths: list[Path] = []
        self._buffer: io.BytesIO | None = None
        self._size = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def write(self, sample: Sample) -> None:
        """Append one sample, beginning a new shard when the current one is full."""
        members = {"json": meta_to_json(sample.meta)} | {media.name: media.data for media in sample.media}
        size = sum(len(data) for data in members.values())
        if self._buffer is not None and self._size + size > self.max_bytes:
            self.close()
        if self._buffer is None:
            import webdataset  # here because it loads torch, which reading shards does not need

            self._buffer = io.BytesIO()
            self._tar = webdataset.TarWriter(self._buffer, encoder=False, mtime=0, user="", group="", mode=0o644)
        self._tar.write({"__key__": sample.key} | members)
        self._size += size

    def close(self) -> None:
        """Finish the current shard and put it on disk."""
        if self._buffer is None:
            return
        self._tar.close()
        path = self.folder / f"{self.prefix}-{len(self.paths):06d}{COMPRESSIONS[self.compression]}"
        path.write_bytes(_compress(self._buffer.getvalue(), compression=self.compression))
        self.paths.append(path)
        self._buffer, self._size = None, 0


def _compress(data: bytes, *, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(data, compresslevel=9, mtime=0)
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if compression == "xz" else data
