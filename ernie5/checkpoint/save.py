"""Writing a checkpoint so that a kill at any instant leaves either the old state or the new one, never a mixture.

Order: all files of all ranks into a temporary directory beside the target, each flushed to disk; the manifest; rename
the directory; then replace `latest`. A failure removes the temporary directory; the previous checkpoint is untouched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.manifest import FileEntry, Manifest, RunState, TensorEntry
from ernie5.checkpoint.names import (
    CONFIG_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    MASTER_PREFIX,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    latest_checkpoint,
    rank_file,
    step_name,
)
from ernie5.checkpoint.outgoing import OutgoingSlice, begin_slices, write_slices
from ernie5.checkpoint.parts import Part, join_records, sync_directory, sync_file, write_record
from ernie5.checkpoint.retention import REPLACED_PREFIX, TEMPORARY_PREFIX, apply_retention, remove_leftovers
from ernie5.checkpoint.tensor_file import LazyTensor, file_hash
from ernie5.engine.interface import MOMENT, PARAMETER, StateSlice
from ernie5.errors import EnvironmentFault, Ernie5Error
from ernie5.observe.faults import Refusal, refusal_of


@dataclasses.dataclass(frozen=True)
class Contents:
    """What one rank of `ranks` puts into a checkpoint: the slices that it holds, of which it writes those that are
    marked, and what all ranks know.

    updates, magnitudes: of the engine; config_yaml: the resolved configuration; tokenizers: identities. part_of:
    as in Manifest, where these ranks write a host's part instead of the whole state.
    """

    slices: tuple[StateSlice, ...]
    updates: int
    magnitudes: torch.Tensor
    run: RunState
    config_yaml: str
    precision: str
    tokenizers: dict[str, str]
    rank: int = 0
    ranks: int = 1
    part_of: str = ""


@dataclasses.dataclass(frozen=True)
class PartPlan:
    """The files of one rank by name, with what they are to hold; known: as in Part."""

    files: dict[str, tuple[OutgoingSlice, ...]]
    known: tuple[str, ...]
    rank: int


def save_checkpoint(folder: Path, *, contents: Contents, config: CheckpointConfig) -> Path:
    """Write the `contents` of a single rank as `folder`/step-N, point `latest` to it, apply retention, and return its
    path; `saver` does it for many ranks.

    Raises EnvironmentFault (disk full, no permission); the previous checkpoint then still stands and is named.
    """
    temporary = temporary_folder(folder, step=contents.run.step, token=str(os.getpid()))
    with failures_explained(folder, temporary=temporary):
        prepare(temporary)
        write_part(temporary, plan=plan_part(contents))
        return publish(temporary, contents=contents, config=config)


def temporary_folder(folder: Path, *, step: int, token: str) -> Path:
    """Where the checkpoint of a step grows; `token` keeps out the ranks of a killed run that are still writing."""
    return folder / f"{TEMPORARY_PREFIX}{step_name(step)}-{token}"


def prepare(temporary: Path) -> None:
    """Make the directory that all ranks write into, and remove what killed saves left. Raises OSError."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(temporary.parent)
    temporary.mkdir()


def plan_part(contents: Contents, *, behind: bool = False) -> PartPlan:
    """What goes into which file of this rank. behind: training goes on meanwhile, so values on a device are copied into
    CPU memory here, and those that are there already (no second copy of them fits) `begin_part` puts into the files."""
    plan = {}
    for name, slices in zip((MODEL_FILE, OPTIMIZER_FILE), _split_slices(contents, behind=behind), strict=True):
        if slices or contents.ranks == 1:
            plan[rank_file(name, rank=contents.rank, ranks=contents.ranks)] = tuple(slices)
    known = tuple(sorted({part.key for part in contents.slices if not part.is_written}))
    return PartPlan(plan, known, contents.rank)


def begin_part(temporary: Path, *, plan: PartPlan) -> None:
    """Write what the next step of training changes; it may go on afterwards. Raises OSError."""
    for name, slices in plan.files.items():
        begin_slices(temporary / name, slices=slices)


def write_part(temporary: Path, *, plan: PartPlan) -> None:
    """Complete one rank's files, one slice in memory at a time, and write last what they hold. Raises OSError."""
    files: dict[str, FileEntry] = {}
    entries: dict[str, TensorEntry] = {}
    for name, slices in plan.files.items():
        files[name] = write_slices(temporary / name, slices=slices, entries=entries)
    write_record(temporary, part=Part(files, entries, plan.known), rank=plan.rank)


def publish(temporary: Path, *, contents: Contents, config: CheckpointConfig) -> Path:
    """Make a checkpoint of what all ranks have written: state, configuration, manifest, and only then its name,
    `latest` and retention. Raises OSError, and CheckpointError where a rank's part is missing or does not fit."""
    folder, step = temporary.parent, contents.run.step
    part = join_records(temporary, ranks=contents.ranks, is_whole=not contents.part_of)
    files = part.files
    run = dataclasses.asdict(contents.run)
    engine = {"updates": contents.updates, "magnitudes": contents.magnitudes.tolist()}
    (temporary / STATE_FILE).write_text(json.dumps({"run": run, "engine": engine}, indent=1), encoding="utf-8")
    (temporary / CONFIG_FILE).write_text(contents.config_yaml, encoding="utf-8")
    for name in (STATE_FILE, CONFIG_FILE):
        sync_file(temporary / name)
        files[name] = FileEntry(num_bytes=(temporary / name).stat().st_size, sha256=file_hash(temporary / name))
    manifest = Manifest(
        step=step,
        tokens=contents.run.tokens,
        precision=contents.precision,
        tokenizers=contents.tokenizers,
        files=files,
        tensors=part.tensors,
        part_of=contents.part_of,
    )
    (temporary / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    sync_file(temporary / MANIFEST_FILE)
    sync_directory(temporary)
    target = folder / step_name(step)
    _rename(temporary, target=target)
    point_latest(folder, target=target)
    apply_retention(folder, newest=step, config=config)
    return target


def _rename(temporary: Path, *, target: Path) -> None:
    doomed = target.with_name(f"{REPLACED_PREFIX}{target.name}")
    if target.exists():
        target.rename(doomed)
    temporary.rename(target)
    shutil.rmtree(doomed, ignore_errors=True)
    sync_directory(target.parent)


@contextlib.contextmanager
def failures_explained(folder: Path, *, temporary: Path | None) -> Iterator[None]:
    """Turn what the disk says into an EnvironmentFault that names the checkpoint that stands; `temporary` goes, so that
    nothing half stays (None: it is another rank's to remove)."""
    try:
        yield
    except Exception as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        refusal = None if isinstance(error, Ernie5Error) else refusal_of(error, place="checkpoint.dir=DIR")
        if refusal is None:
            raise
        raise EnvironmentFault(_failure_text(folder, refusal=refusal)) from error


def point_latest(folder: Path, *, target: Path) -> None:
    """Let `folder`/latest name the checkpoint `target`, atomically; one that lies elsewhere by its whole path."""
    folder.mkdir(parents=True, exist_ok=True)
    is_inside = target.resolve().parent == folder.resolve()
    _replace_text(folder / LATEST_FILE, text=f"{target.name if is_inside else target.resolve()}\n")


def _failure_text(folder: Path, *, refusal: Refusal) -> str:
    previous = latest_checkpoint(folder)
    stands = f"The previous checkpoint stands: {previous}" if previous else "No earlier checkpoint exists"
    return f"saving to {folder} failed: {refusal.what}. {stands}. {refusal.way}"


def _split_slices(contents: Contents, *, behind: bool) -> tuple[list[OutgoingSlice], list[OutgoingSlice]]:
    """What goes into model.safetensors (weights in training precision, buffers) and into optimizer.safetensors.

    With bf16 the fp32 masters go to the optimizer file; with fp32 the weights are the masters and are stored once.
    """
    is_bf16 = contents.precision == "bf16"
    weights: list[OutgoingSlice] = []
    optimizer: list[OutgoingSlice] = []
    for part in (part for part in contents.slices if part.is_written):
        changes = behind and part.values.device.type == "cpu"
        if behind and not changes:
            part = dataclasses.replace(part, values=part.values.to("cpu", copy=True))
        dtype = torch.bfloat16 if part.kind == PARAMETER and is_bf16 else part.values.dtype
        own = optimizer if part.kind == MOMENT else weights
        own.append(_outgoing(part, key=part.key, dtype=dtype, changes=changes))
        if part.kind == PARAMETER and is_bf16:
            master = _outgoing(part, key=MASTER_PREFIX + part.key, dtype=part.values.dtype, changes=changes)
            optimizer.append(master)
    return weights, optimizer


def _outgoing(part: StateSlice, *, key: str, dtype: torch.dtype, changes: bool) -> OutgoingSlice:
    lazy = LazyTensor(dtype, part.box.shape, lambda: part.values.detach().cpu())
    return OutgoingSlice(key, part.shape, part.box, lazy, changes)


def _replace_text(path: Path, *, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink()
        raise
    sync_directory(path.parent)
