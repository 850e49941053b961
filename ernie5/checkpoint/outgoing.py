"""Slices on their way into a file, and what the manifest says of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ernie5.checkpoint.manifest import FileEntry, SliceEntry, TensorEntry, slice_name
from ernie5.checkpoint.tensor_file import LazyTensor, dtype_name, write_tensor_file
from ernie5.parallel.boxes import Box


@dataclasses.dataclass(frozen=True)
class OutgoingSlice:
    """The box of the tensor `key` of whole `shape` that a file is to hold; its values exist while it is written."""

    key: str
    shape: tuple[int, ...]
    box: Box
    values: LazyTensor


def write_slices(path: Path, *, slices: Sequence[OutgoingSlice], entries: dict[str, TensorEntry]) -> FileEntry:
    """Write one file of slices and add them to `entries`. Raises OSError."""
    names = [slice_name(part.key, box=part.box, shape=part.shape) for part in slices]
    lazy = {name: part.values for name, part in zip(names, slices, strict=True)}
    written = write_tensor_file(path, tensors=lazy)
    for name, part in zip(names, slices, strict=True):
        dtype = part.values.dtype
        held = entries[part.key].slices if part.key in entries else ()
        entries[part.key] = TensorEntry(
            shape=part.shape,
            dtype=dtype_name(dtype),
            num_bytes=math.prod(part.shape) * dtype.itemsize,
            slices=(*held, SliceEntry(path.name, part.box.start, part.box.shape, written.crcs[name])),
        )
    return written.file
