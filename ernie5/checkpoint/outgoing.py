"""Slices on their way into a file, and what the manifest says of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ernie5.checkpoint.manifest import FileEntry, SliceEntry, TensorEntry, slice_name
from ernie5.checkpoint.tensor_file import LazyTensor, begin_tensor_file, dtype_name, write_tensor_file
from ernie5.parallel.boxes import Box


@dataclasses.dataclass(frozen=True)
class OutgoingSlice:
    """The box of the tensor `key` of whole `shape` that a file is to hold; its values exist while it is written.

    changes: they will be others by then, so that `begin_slices` must have put them into the file.
    """

    key: str
    shape: tuple[int, ...]
    box: Box
    values: LazyTensor
    changes: bool = False

    @property
    def name(self) -> str:
        """What the slice is called in its file."""
        return slice_name(self.key, box=self.box, shape=self.shape)


def begin_slices(path: Path, *, slices: Sequence[OutgoingSlice]) -> None:
    """Put the values that will change into the file that `write_slices` completes. Raises OSError."""
    now = {part.name for part in slices if part.changes}
    if now:
        begin_tensor_file(path, tensors={part.name: part.values for part in slices}, now=now)


def write_slices(path: Path, *, slices: Sequence[OutgoingSlice], entries: dict[str, TensorEntry]) -> FileEntry:
    """Write one file of slices and add them to `entries`. Raises OSError."""
    begun = {part.name for part in slices if part.changes}
    written = write_tensor_file(path, tensors={part.name: part.values for part in slices}, begun=begun)
    for part in slices:
        dtype = part.values.dtype
        held = entries[part.key].slices if part.key in entries else ()
        entries[part.key] = TensorEntry(
            shape=part.shape,
            dtype=dtype_name(dtype),
            num_bytes=math.prod(part.shape) * dtype.itemsize,
            slices=(*held, SliceEntry(path.name, part.box.start, part.box.shape, written.crcs[part.name])),
        )
    return written.file
