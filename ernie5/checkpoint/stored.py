"""The tensors of a checkpoint by name, read box by box, from one file or from those of many ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from ernie5.checkpoint.manifest import Manifest, SliceEntry, TensorEntry, name_in_file
from ernie5.checkpoint.tensor_slices import TensorPlace, read_box, read_header
from ernie5.errors import CheckpointError
from ernie5.parallel.boxes import Box, whole_box


class StoredTensors:
    """Opens a file when a slice of it is first needed, so that a rank looks only into the files that it shares."""

    def __init__(self, directory: Path, *, manifest: Manifest) -> None:
        self.directory, self.entries = directory, manifest.tensors
        self._headers: dict[str, dict[str, TensorPlace]] = {}

    def read(self, key: str, *, box: Box, into: torch.Tensor) -> None:
        """Write `box` of the tensor `key` into the view `into`. Raises CheckpointError naming file and slice."""
        entry = self.entries[key]
        parts = [part for part in entry.slices if part.box.overlap(box) is not None]
        read_box(self._join(key, entry=entry, parts=parts), box=box, into=into)

    def read_whole(self, key: str) -> torch.Tensor:
        """A tensor in memory of its own, in its stored dtype."""
        place = self.place(key)
        values = torch.empty(place.shape, dtype=place.torch_dtype)
        read_box(place, box=whole_box(place.shape), into=values)
        return values

    def place(self, key: str) -> TensorPlace:
        """Where a whole tensor lies."""
        entry = self.entries[key]
        return self._join(key, entry=entry, parts=list(entry.slices))

    def _join(self, key: str, *, entry: TensorEntry, parts: list[SliceEntry]) -> TensorPlace:
        found = [(part.box, self._find(key, entry=entry, part=part)) for part in parts]
        first = found[0][1] if found else TensorPlace(self.directory, entry.dtype, entry.shape, 0, 0)
        if len(found) == 1 and parts[0].shape == entry.shape:
            return first
        return TensorPlace(first.path, entry.dtype, entry.shape, first.start, first.stop, tuple(found))

    def _find(self, key: str, *, entry: TensorEntry, part: SliceEntry) -> TensorPlace:
        if part.file not in self._headers:
            self._headers[part.file] = read_header(self.directory / part.file)
        name = name_in_file(key, entry=entry, part=part)
        place = self._headers[part.file].get(name)
        if place is None or (place.shape, place.dtype) != (part.shape, entry.dtype):
            held = "does not hold it" if place is None else f"holds {list(place.shape)} {place.dtype}"
            raise CheckpointError(
                f"the manifest of {self.directory} says that {part.file} holds {name} of shape {list(part.shape)} "
                f"{entry.dtype}, and the file {held}: files of different checkpoints were mixed. Use another checkpoint"
            )
        return place
