"""Parts of tensors in safetensors files by plain reads and writes, so that memory is what is asked for and no more.

A mapped file counts as resident memory page by page until the whole shard is in; a positioned read into a buffer of
our own does not. The format is eight bytes of header length (little-endian), a JSON header of names, dtypes, shapes
and byte ranges, then the bytes (https://huggingface.co/docs/safetensors, section Format).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ernie5.checkpoint.tensor_file import DTYPES, METADATA_KEY, NewTensor, file_header, raw_bytes
from ernie5.errors import CheckpointError
from ernie5.parallel.boxes import Box, flat_boxes, whole_box

ITEM_BYTES: Mapping[str, int] = types.MappingProxyType({name: dtype.itemsize for name, dtype in DTYPES.items()})
# Real headers of 300 B models have a few megabytes; a damaged length must not become an allocation.
LARGEST_HEADER = 100 * 2**20
BLOCK_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies: its file, dtype as safetensors names it, shape, and bytes [start, stop) of the file.

    parts: of a tensor that is stored in several slices, each with its box; path, start and stop then mean the first.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    parts: tuple[tuple[Box, TensorPlace], ...] = ()

    @property
    def paths(self) -> set[Path]:
        """Every file that holds some of it."""
        return {part.path for _, part in self.parts} or {self.path}

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype as torch knows it."""
        return DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def read_header(path: Path, *, may_be_cut: bool = False) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name; may_be_cut: even those that reach beyond its end.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise CheckpointError(f"{path} is cut off or no safetensors file: {size} bytes do not hold its header")
            values = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no table of tensors")
    values.pop(METADATA_KEY, None)
    places = {name: _place(path, name=name, entry=entry, data=8 + length) for name, entry in values.items()}
    beyond = [name for name, place in places.items() if place.stop > size]
    if beyond and not may_be_cut:
        raise CheckpointError(
            f"{path} is cut off after {size} bytes: {len(beyond)} tensors are not whole (first: {beyond[0]}). Copy it "
            "again"
        )
    return places


def _place(path: Path, *, name: str, entry: object, data: int) -> TensorPlace:
    try:
        start, stop = (int(value) for value in entry["data_offsets"])
        shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header's entry of tensor {name} is damaged ({error!r})") from None
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {dtype}; known are {', '.join(DTYPES)}. Quantised weights cannot be "
            "converted: take the bf16 release"
        )
    if min((start, *shape), default=0) < 0 or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} {dtype} cannot fill bytes {start}..{stop}")
    return TensorPlace(path, dtype, shape, data + start, data + stop)


def read_span(place: TensorPlace, *, first: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The elements first, first + 1, ... of a tensor in row-major order, as `shape`, in memory of their own.

    Raises CheckpointError when the file ends early.
    """
    item = ITEM_BYTES[place.dtype]
    if place.parts:
        flat = torch.empty(math.prod(shape), dtype=DTYPES[place.dtype])
        done = 0
        for box in flat_boxes(place.shape, first=first, stop=first + flat.numel()):
            read_box(place, box=box, into=flat[done : done + box.numel].view(box.shape))
            done += box.numel
        return flat.view(shape)
    buffer = torch.empty(math.prod(shape) * item, dtype=torch.uint8)
    with place.path.open("rb", buffering=0) as file:
        _fill(file.fileno(), place=place, view=memoryview(buffer.numpy()), offset=place.start + first * item)
    return buffer.view(DTYPES[place.dtype]).view(shape)


def read_columns(place: TensorPlace, *, start: int, stop: int) -> torch.Tensor:
    """Columns start..stop of a matrix [R, C] -> [R, stop-start]: one read per row, or one where all are wanted."""
    rows, columns = place.shape
    if (start, stop) == (0, columns):
        return read_span(place, first=0, shape=place.shape)
    if place.parts:
        values = torch.empty(rows, stop - start, dtype=DTYPES[place.dtype])
        read_box(place, box=Box((0, start), (rows, stop - start)), into=values)
        return values
    item = ITEM_BYTES[place.dtype]
    buffer = torch.empty(rows, (stop - start) * item, dtype=torch.uint8)
    with place.path.open("rb", buffering=0) as file:
        for row, target in enumerate(buffer.numpy()):
            offset = place.start + (row * columns + start) * item
            _fill(file.fileno(), place=place, view=memoryview(target), offset=offset)
    return buffer.view(DTYPES[place.dtype])


def read_box(place: TensorPlace, *, box: Box, into: torch.Tensor) -> None:
    """Write the values of `box` of the tensor at `place` into the view `into`, which has the box's shape, any dtype and
    any device; beside it there is one block of memory, none where `into` can take the bytes as they are.

    Raises CheckpointError when a file ends early.
    """
    if into.numel() == 0:
        return
    for held, part in place.parts or ((whole_box(place.shape), place),):
        common = held.overlap(box)
        if common is None:
            continue
        target = into
        for dim, (start, size) in enumerate(zip(common.seen_from(box).start, common.shape, strict=True)):
            target = target.narrow(dim, start, size)
        with part.path.open("rb", buffering=0) as file:
            _read_part(file.fileno(), place=part, box=common.seen_from(held), into=target)


def _read_part(descriptor: int, *, place: TensorPlace, box: Box, into: torch.Tensor, first: int = 0) -> None:
    """`box` of the tensor of place.shape[-dims of box:] whose first element is number `first` of the file's tensor."""
    dims = len(box.shape)
    shape = place.shape[len(place.shape) - dims :]
    if dims == 0 or box.shape[1:] == shape[1:]:  # whole rows: contiguous in the file
        begin = first + (box.start[0] * math.prod(shape[1:]) if dims else 0)
        _read_rows(descriptor, place=place, first=begin, into=into)
        return
    row = math.prod(shape[1:])
    rows = max(1, BLOCK_BYTES // (row * ITEM_BYTES[place.dtype]))
    if rows == 1:
        for index in range(box.shape[0]):
            inner = Box(box.start[1:], box.shape[1:])
            begin = first + (box.start[0] + index) * row
            _read_part(descriptor, place=place, box=inner, into=into[index], first=begin)
        return
    for start in range(0, box.shape[0], rows):
        count = min(rows, box.shape[0] - start)
        block = torch.empty(count, *shape[1:], dtype=DTYPES[place.dtype])
        _read_rows(descriptor, place=place, first=first + (box.start[0] + start) * row, into=block)
        for dim, (begin, size) in enumerate(zip(box.start[1:], box.shape[1:], strict=True), start=1):
            block = block.narrow(dim, begin, size)
        into[start : start + count].copy_(block)


def _read_rows(descriptor: int, *, place: TensorPlace, first: int, into: torch.Tensor) -> None:
    """The elements from number `first` on, in row-major order, into `into`."""
    item = ITEM_BYTES[place.dtype]
    offset = place.start + first * item
    if into.device.type == "cpu" and into.is_contiguous() and into.dtype == DTYPES[place.dtype]:
        _fill(descriptor, place=place, view=raw_bytes(into), offset=offset)
        return
    rows, row = (into.shape[0], math.prod(into.shape[1:])) if into.dim() else (1, 1)
    at_once = max(1, BLOCK_BYTES // (row * item))
    for start in range(0, rows, at_once):
        target = into[start : start + at_once] if into.dim() else into
        block = torch.empty(target.shape, dtype=DTYPES[place.dtype])
        _fill(descriptor, place=place, view=raw_bytes(block), offset=offset + start * row * item)
        target.copy_(block)


def _fill(descriptor: int, *, place: TensorPlace, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{place.path} ends at byte {offset + done}, its header promises more. Copy it again")
        done += count


def write_span(descriptor: int, *, place: TensorPlace, first: int, values: torch.Tensor) -> memoryview:
    """Write `values` from element `first` of the tensor at `place`; returns the bytes written, for checksums."""
    view = raw_bytes(values.contiguous())
    _write_all(descriptor, view=view, offset=place.start + first * ITEM_BYTES[place.dtype])
    return view


def write_columns(descriptor: int, *, place: TensorPlace, start: int, values: torch.Tensor) -> None:
    """Write `values` [R, c] into columns start.. of the matrix [R, C] at `place`."""
    columns, item = place.shape[1], ITEM_BYTES[place.dtype]
    if values.shape[1] == columns:
        write_span(descriptor, place=place, first=0, values=values)
        return
    for row, source in enumerate(values.contiguous().view(torch.uint8).numpy()):
        _write_all(descriptor, view=memoryview(source), offset=place.start + (row * columns + start) * item)


def _write_all(descriptor: int, *, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):  # a nearly full disk writes less than it was given
        done += os.pwrite(descriptor, view[done:], offset + done)


def create_file(path: Path, *, tensors: Sequence[NewTensor]) -> dict[str, TensorPlace]:
    """Write the header of a file that is to hold `tensors` in this order, at its final size; returns their places."""
    header = file_header(tensors, metadata={"format": "pt"})  # older transformers refuse files without it
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.num_bytes for tensor in tensors))
    return read_header(path)
