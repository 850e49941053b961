"""The copy: for every tensor of the target its pieces, block by block, so that memory does not grow with the model."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ernie5.checkpoint.convert.layouts import Piece, Stored
from ernie5.checkpoint.convert.source import Location
from ernie5.checkpoint.convert.workspace import Workspace
from ernie5.checkpoint.tensor_file import DTYPES, dtype_name
from ernie5.checkpoint.tensor_slices import (
    ITEM_BYTES,
    NewTensor,
    TensorPlace,
    create_file,
    read_columns,
    read_header,
    read_span,
    write_columns,
    write_span,
)
from ernie5.errors import CheckpointError

BLOCK_BYTES = 1 << 24
# Between two promises to have written, so many bytes are synchronised with the disk at once.
SYNC_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class PlannedFile:
    """One file of the target: its name, its tensors in order, and their dtypes."""

    name: str
    tensors: tuple[Stored, ...]
    dtypes: tuple[str, ...]

    def headers(self) -> tuple[NewTensor, ...]:
        """What the file's header says."""
        return tuple(NewTensor(t.name, d, t.shape) for t, d in zip(self.tensors, self.dtypes, strict=True))


def plan_files(
    layout: Sequence[Stored], *, pieces: dict[str, Location | torch.Tensor], dtype: str | None, keep_fp32: bool,
    shard_bytes: int | None,
) -> tuple[PlannedFile, ...]:
    """Spread the tensors of `layout` over files of at most `shard_bytes` (None: one file), named as on the hub.

    dtype: of all tensors, None as they are stored; where `keep_fp32`, routers and biases are fp32 whatever it says.
    """
    groups: list[list[tuple[Stored, str]]] = [[]]
    filled = 0
    for stored in layout:
        chosen = _dtype_of(stored, pieces=pieces, dtype=dtype, keep_fp32=keep_fp32)
        size = math.prod(stored.shape) * ITEM_BYTES[chosen]
        if groups[-1] and shard_bytes is not None and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((stored, chosen))
        filled += size
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = ["model.safetensors"] if count == 1 else names
    return tuple(
        PlannedFile(name, tuple(s for s, _ in group), tuple(d for _, d in group))
        for name, group in zip(names, groups, strict=True)
    )


def _dtype_of(
    stored: Stored, *, pieces: dict[str, Location | torch.Tensor], dtype: str | None, keep_fp32: bool
) -> str:
    found = [pieces[piece.name] for piece in stored.pieces if piece.name in pieces]
    given = {DTYPES[item.place.dtype] if isinstance(item, Location) else item.dtype for item in found}
    if any(piece.needs_fp32 for piece in stored.pieces) and (keep_fp32 or dtype is not None):
        return "F32"
    if torch.int64 in given:
        raise CheckpointError(f"tensor {stored.name} holds whole numbers; weights are expected")
    if dtype is not None:
        return dtype
    widest = given.pop()
    for other in given:
        widest = torch.promote_types(widest, other)
    return dtype_name(widest)


@dataclasses.dataclass(frozen=True)
class CopiedTensor:
    """What a copy left: the file, where the tensor lies in it, and the CRC-32 of its bytes (0 where transposed)."""

    file: str
    place: TensorPlace
    crc32: int


def copy_tensors(
    files: Sequence[PlannedFile], *, pieces: dict[str, Location | torch.Tensor], workspace: Workspace
) -> dict[str, CopiedTensor]:
    """Write every file of the plan into the workspace, skipping what an earlier, killed run has finished."""
    copied: dict[str, CopiedTensor] = {}
    for planned in files:
        path = workspace.folder / planned.name
        pending: dict[str, int] = {}
        if not any(workspace.is_done(planned.name, tensor.name) for tensor in planned.tensors):
            create_file(path, tensors=planned.headers())
        places = read_header(path)
        with path.open("r+b", buffering=0) as file:
            waiting = 0
            for stored in planned.tensors:
                place = places[stored.name]
                crc = workspace.crc_of(planned.name, stored.name)
                if crc is None:
                    crc = _copy_one(file.fileno(), stored=stored, place=place, pieces=pieces)
                    pending[stored.name] = crc
                    waiting += place.num_bytes
                copied[stored.name] = CopiedTensor(planned.name, place, crc)
                if waiting > SYNC_BYTES:
                    os.fsync(file.fileno())
                    workspace.record(planned.name, crcs=pending)
                    pending, waiting = {}, 0
            os.fsync(file.fileno())
        workspace.record(planned.name, crcs=pending)
    return copied


def _copy_one(
    descriptor: int, *, stored: Stored, place: TensorPlace, pieces: dict[str, Location | torch.Tensor]
) -> int:
    """Copy all pieces of one tensor; returns the CRC-32 of what was written in order."""
    crc, row = 0, 0
    dtype = DTYPES[place.dtype]
    for piece in stored.pieces:
        inner = piece.size // piece.shape[0] if piece.shape else 1
        for start, block in _blocks(piece, found=pieces[piece.name]):
            values = block.to(dtype)
            if stored.transposed:
                write_columns(descriptor, place=place, start=row + start, values=values.T)
            else:
                view = write_span(descriptor, place=place, first=(row + start) * inner, values=values)
                crc = zlib.crc32(view, crc)
        row += piece.shape[0] if piece.shape else 1
    return crc


def _blocks(piece: Piece, *, found: Location | torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows of a piece in blocks, each with the number of its first row."""
    if isinstance(found, torch.Tensor):
        yield 0, found.view(piece.shape)
        return
    rows = piece.shape[0] if piece.shape else 1
    inner = piece.size // max(rows, 1)
    step = max(1, BLOCK_BYTES // max(1, inner * ITEM_BYTES[found.place.dtype]))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield start, _read(found, piece=piece, start=start, stop=stop, inner=inner)


def _read(found: Location, *, piece: Piece, start: int, stop: int, inner: int) -> torch.Tensor:
    place, row = found.place, found.row
    if found.flipped:
        return read_columns(place, start=row + start, stop=row + stop).T
    if found.column is None:
        shape = (stop - start, *piece.shape[1:]) if piece.shape else ()
        return read_span(place, first=(row + start) * inner, shape=shape)
    width = place.shape[1]
    whole = read_span(place, first=(row + start) * width, shape=(stop - start, width))
    return whole[:, found.column : found.column + inner]


def total_bytes(files: Sequence[PlannedFile]) -> int:
    """Bytes of all tensors of a plan."""
    return sum(tensor.num_bytes for planned in files for tensor in planned.headers())


def describe_plan(files: Sequence[PlannedFile]) -> list[object]:
    """The plan as plain values, for the fingerprint that tells whether a killed conversion may go on."""
    return [[planned.name, [dataclasses.astuple(tensor) for tensor in planned.headers()]] for planned in files]


def file_stamps(paths: Sequence[Path]) -> list[object]:
    """Size and time of change of the source files: a source that changed must not be continued from."""
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(set(paths))]
