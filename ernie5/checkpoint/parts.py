"""What each rank says about the files that it has written, until rank 0 makes one manifest of it. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

from ernie5.checkpoint.manifest import FileEntry, TensorEntry, read_entry
from ernie5.errors import CheckpointError
from ernie5.parallel.boxes import covers

RECORD_PREFIX = ".part-"


@dataclasses.dataclass(frozen=True)
class Part:
    """Files by name, and tensors by key with the slices that these files hold of them; known: keys of which the rank
    holds something that others write."""

    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    known: tuple[str, ...] = ()


def write_record(folder: Path, *, part: Part, rank: int) -> None:
    """Leave the record of one rank, whole or not at all: whoever sees it may rely on the files. Raises OSError."""
    path = _record(folder, rank=rank)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(dataclasses.asdict(part)), encoding="utf-8")
    sync_file(temporary)
    temporary.replace(path)


def missing_ranks(folder: Path, *, ranks: int) -> list[int]:
    """The ranks that have not written their record."""
    return [rank for rank in range(ranks) if not _record(folder, rank=rank).is_file()]


def activity(folder: Path) -> tuple[int, int]:
    """What the ranks have written so far, while they rename files: bytes, and when the last was touched (ns). Another
    value than before says that somebody is at work."""
    size = newest = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # renamed since the folder was listed
            found = path.stat()
            size, newest = size + found.st_size, max(newest, found.st_mtime_ns)
    return size, newest


def join_records(folder: Path, *, ranks: int, is_whole: bool = True) -> Part:
    """One part of all ranks' records, which are removed; keys in natural order, so that no layout shows in it.

    Raises CheckpointError where a rank's record or file is missing, or, if the state `is_whole` among these ranks,
    where the slices of a tensor do not make it up.
    """
    missing = missing_ranks(folder, ranks=ranks)
    if missing:
        raise CheckpointError(f"rank {missing[0]} of {ranks} has written nothing into {folder}: this save is void")
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    known: set[str] = set()
    for rank in range(ranks):
        values = json.loads(_record(folder, rank=rank).read_text(encoding="utf-8"))
        known |= set(values["known"])
        files |= {name: FileEntry(**entry) for name, entry in values["files"].items()}
        for key, entry in values["tensors"].items():
            tensors[key] = _join(key, tensors.get(key), read_entry(key, entry, is_part=True))
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.num_bytes:
            raise CheckpointError(f"{path} is not the file that its rank has written: this save is void")
    lost = sorted(known - set(tensors))
    if lost:
        raise CheckpointError(f"no rank wrote {lost[0]}: this save is void. It is a fault of the program: report it")
    for key, entry in tensors.items():
        if is_whole and not covers(entry.shape, boxes=[part.box for part in entry.slices]):
            found = ", ".join(f"{part.file} {part.box.describe()}" for part in entry.slices)
            raise CheckpointError(
                f"the ranks wrote {found} of {key}, which do not make up its shape {list(entry.shape)}: this save is "
                "void. It is a fault of the program: report it with the layout"
            )
    for rank in range(ranks):
        _record(folder, rank=rank).unlink()
    return Part(dict(sorted(files.items())), {key: tensors[key] for key in sorted(tensors, key=_natural)})


def _join(key: str, held: TensorEntry | None, added: TensorEntry, /) -> TensorEntry:
    if held is None:
        return added
    if (held.shape, held.dtype) != (added.shape, added.dtype):
        raise CheckpointError(
            f"two ranks wrote {key} as {list(held.shape)} {held.dtype} and as {list(added.shape)} {added.dtype}: this "
            "save is void. Check that all hosts run the same version"
        )
    slices = sorted((*held.slices, *added.slices), key=lambda part: part.start)
    return dataclasses.replace(held, slices=tuple(slices))


def _natural(key: str) -> tuple[tuple[int, str | int], ...]:
    """Layer 2 before layer 10; parameters before moments, whose keys hold a slash."""
    pieces = re.split(r"(\d+)", key)
    return ((key.count("/"), 0), *((1, int(piece)) if piece.isdigit() else (0, piece) for piece in pieces))


def _record(folder: Path, *, rank: int) -> Path:
    return folder / f"{RECORD_PREFIX}{rank:05d}.json"


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
