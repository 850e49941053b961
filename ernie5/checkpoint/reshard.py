"""Another set of files for the same checkpoint: one, some number of equal ones, or those that a layout would write.

No layout needs it to read a checkpoint. It makes one out of many files to carry away, or files of which every rank of a
layout opens only its own. Each slice is read when it is written: one is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import heapq
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ernie5.checkpoint.convert.source import STASH
from ernie5.checkpoint.convert.workspace import LOCK, check_target, growing
from ernie5.checkpoint.convert.workspace import publish as give_name
from ernie5.checkpoint.load import kept_folders
from ernie5.checkpoint.manifest import FileEntry, Manifest, TensorEntry, read_manifest
from ernie5.checkpoint.names import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    find_checkpoint,
    rank_file,
)
from ernie5.checkpoint.outgoing import OutgoingSlice, write_slices
from ernie5.checkpoint.parts import Part, join_records, write_record
from ernie5.checkpoint.stored import StoredTensors
from ernie5.checkpoint.tensor_file import DTYPES, LazyTensor
from ernie5.checkpoint.verify import find_damage
from ernie5.errors import CheckpointError
from ernie5.model.shard_plan import placements_of
from ernie5.parallel.boxes import Box, Held, whole_box
from ernie5.parallel.dims import GridDims
from ernie5.parallel.held import GridPlace, held_parts, planned_layout, written_names
from ernie5.parallel.stages import StagePlan
from ernie5.tokenizers.kept import KEPT_FOLDER, bring_kept


@dataclasses.dataclass(frozen=True)
class LayoutPlan:
    """The layout that files are made for: its grids, and which stage holds which layers."""

    dims: GridDims
    stages: StagePlan


def reshard(
    source: Path, *, target: Path, ranks: int, plan: LayoutPlan | None = None, force: bool = False
) -> Manifest:
    """Write the checkpoint that `source` means as `target`, in the files of `ranks` writers; returns the new manifest.

    plan: cut tensors as the ranks of this layout hold them; None: whole tensors, spread by bytes. What is there already
    under the name of `target` goes only once the new one stands, and only with `force`. Raises CheckpointError.
    """
    directory = find_checkpoint(source)
    check_target(target, source=directory, force=force)
    manifest = read_manifest(directory)
    if plan is None and ranks > max(1, len(manifest.tensors)):
        raise CheckpointError(
            f"{directory} has {len(manifest.tensors)} tensors, which are kept whole, and {ranks} files are wanted. "
            f"Give --files {len(manifest.tensors)} or fewer, or cut tensors by --layout"
        )
    damage = find_damage(directory, manifest=manifest)
    if damage:
        raise CheckpointError(f"{'; '.join(damage)}. Take another checkpoint")
    tensors = StoredTensors(directory, manifest=manifest)
    spread = _spread(manifest, ranks=ranks) if plan is None else []
    with growing(target, is_continued=False) as folder:
        for path in folder.iterdir():  # of a killed call
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for rank in range(ranks):
            if plan is None:
                wanted = spread[rank]
            else:
                wanted = list(_cut(manifest, rank=rank, plan=plan))
            _write_rank(folder, wanted=wanted, tensors=tensors, rank=rank, ranks=ranks)
        part = join_records(folder, ranks=ranks)
        _bring_the_rest(directory, manifest=manifest, folder=folder)
        small = {name: manifest.files[name] for name in (STATE_FILE, CONFIG_FILE) if name in manifest.files}
        new = dataclasses.replace(manifest, files=part.files | small, tensors=part.tensors)
        (folder / MANIFEST_FILE).write_text(new.to_json(), encoding="utf-8")
        give_name(folder, target=target)
    return new


def _write_rank(
    folder: Path, *, wanted: list[tuple[str, Box]], tensors: StoredTensors, rank: int, ranks: int
) -> None:
    files: dict[str, FileEntry] = {}
    entries: dict[str, TensorEntry] = {}
    for name in (MODEL_FILE, OPTIMIZER_FILE):
        own = [(key, box) for key, box in wanted if _file_of(key) == name]
        is_there = any(_file_of(key) == name for key in tensors.entries)
        if own or (ranks == 1 and is_there):
            file = rank_file(name, rank=rank, ranks=ranks)
            slices = [_outgoing(key, box=box, tensors=tensors) for key, box in own]
            files[file] = write_slices(folder / file, slices=slices, entries=entries)
    write_record(folder, part=Part(files, entries), rank=rank)


def _outgoing(key: str, *, box: Box, tensors: StoredTensors) -> OutgoingSlice:
    entry = tensors.entries[key]
    dtype = DTYPES[entry.dtype]

    def read() -> torch.Tensor:
        values = torch.empty(box.shape, dtype=dtype)
        tensors.read(key, box=box, into=values)
        return values

    return OutgoingSlice(key, entry.shape, box, LazyTensor(dtype, box.shape, read))


def _spread(manifest: Manifest, *, ranks: int) -> list[list[tuple[str, Box]]]:
    """What each writer gets: whole tensors, the largest first, each to the one that has the fewest bytes so far."""
    shares: list[list[tuple[str, Box]]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for key, entry in sorted(manifest.tensors.items(), key=lambda item: (-item[1].num_bytes, item[0])):
        load, lightest = loads[0]
        heapq.heapreplace(loads, (load + entry.num_bytes, lightest))
        shares[lightest].append((key, whole_box(entry.shape)))
    return shares


def _cut(manifest: Manifest, *, rank: int, plan: LayoutPlan) -> Iterator[tuple[str, Box]]:
    """What the rank of a layout holds and saves, in the way of the grid engine."""
    shapes = {key: entry.shape for key, entry in manifest.tensors.items() if "/" not in key and placements_of(key)}
    layout = planned_layout(shapes, place=GridPlace(plan.dims, rank=rank), stages=plan.stages)
    parts = held_parts(layout)
    written = written_names(layout, parts=parts)
    for key, entry in manifest.tensors.items():
        name = key.split("/", 1)[-1]
        if entry.shape == shapes.get(name):
            if name in written:
                yield from ((key, box) for box in _boxes(parts[name]))
        elif rank == 0:
            yield key, whole_box(entry.shape)


def _boxes(held: Held) -> Iterator[Box]:
    return (piece.box for piece in held.pieces(first=0, stop=held.numel))


def _file_of(key: str) -> str:
    return OPTIMIZER_FILE if "/" in key else MODEL_FILE


def _bring_the_rest(directory: Path, *, manifest: Manifest, folder: Path) -> None:
    """State, configuration, what a converted checkpoint brought along, and the tokenizers that its run keeps."""
    for name in (STATE_FILE, CONFIG_FILE):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, folder / name)
    if (directory / STASH).is_dir():
        shutil.copytree(directory / STASH, folder / STASH)
    bring_kept(folder / KEPT_FOLDER, identities=manifest.tokenizers, folders=kept_folders(directory))
