"""Writing a checkpoint so that a kill at any instant leaves either the old state or the new one, never a mixture.

Order: all files into a temporary directory beside the target, each flushed to disk; rename the directory; then replace
`latest`. A failure removes the temporary directory and leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
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
    step_name,
)
from ernie5.checkpoint.retention import REPLACED_PREFIX, TEMPORARY_PREFIX, apply_retention, remove_leftovers
from ernie5.checkpoint.tensor_file import file_hash, write_tensor_file
from ernie5.engine.interface import EngineState
from ernie5.errors import EnvironmentFault

@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that goes into a checkpoint. config_yaml: the resolved configuration; tokenizers: identities."""

    engine: EngineState
    run: RunState
    config_yaml: str
    precision: str
    tokenizers: dict[str, str]


def save_checkpoint(folder: Path, *, contents: Contents, config: CheckpointConfig) -> Path:
    """Write `contents` as `folder`/step-N, point `latest` to it, apply retention, and return its path.

    Raises EnvironmentFault (disk full, no permission); the previous checkpoint then still stands and is named.
    """
    target = folder / step_name(contents.run.step)
    temporary = folder / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temporary.mkdir()
        _write_files(temporary, contents=contents)
        if target.exists():
            doomed = folder / f"{REPLACED_PREFIX}{target.name}"
            target.rename(doomed)
            temporary.rename(target)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            temporary.rename(target)
        _sync_directory(folder)
        point_latest(folder, target=target)
        apply_retention(folder, newest=contents.run.step, config=config)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error) or "os error 28" in str(error):
            raise EnvironmentFault(_failure_text(folder, error=error)) from error
        raise
    return target


def point_latest(folder: Path, *, target: Path) -> None:
    """Let `folder`/latest name the checkpoint `target`, atomically; one that lies elsewhere by its whole path."""
    folder.mkdir(parents=True, exist_ok=True)
    is_inside = target.resolve().parent == folder.resolve()
    _replace_text(folder / LATEST_FILE, text=f"{target.name if is_inside else target.resolve()}\n")


def _failure_text(folder: Path, *, error: Exception) -> str:
    previous = latest_checkpoint(folder)
    stands = f"The previous checkpoint stands: {previous}" if previous else "No earlier checkpoint exists"
    return f"saving to {folder} failed: {error}. {stands}. Free disk space or repair permissions and run again"


def _write_files(directory: Path, *, contents: Contents) -> None:
    weights, optimizer = split_tensors(contents.engine, precision=contents.precision)
    files: dict[str, FileEntry] = {}
    entries: dict[str, TensorEntry] = {}
    for name, tensors in ((MODEL_FILE, weights), (OPTIMIZER_FILE, optimizer)):
        written = write_tensor_file(directory / name, tensors=tensors)
        files[name] = written.file
        entries.update(written.tensors)
    run = dataclasses.asdict(contents.run)
    engine = {"updates": contents.engine.updates, "magnitudes": contents.engine.magnitudes.tolist()}
    (directory / STATE_FILE).write_text(json.dumps({"run": run, "engine": engine}, indent=1), encoding="utf-8")
    (directory / CONFIG_FILE).write_text(contents.config_yaml, encoding="utf-8")
    for name in (STATE_FILE, CONFIG_FILE):
        _sync_file(directory / name)
        files[name] = FileEntry(num_bytes=(directory / name).stat().st_size, sha256=file_hash(directory / name))
    manifest = Manifest(
        step=contents.run.step,
        tokens=contents.run.tokens,
        precision=contents.precision,
        tokenizers=contents.tokenizers,
        files=files,
        tensors=entries,
    )
    (directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    _sync_file(directory / MANIFEST_FILE)
    _sync_directory(directory)


def split_tensors(
    state: EngineState, *, precision: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of model.safetensors (weights in training precision, buffers) and of optimizer.safetensors.

    With bf16 the fp32 masters go to the optimizer file; with fp32 the weights are the masters and are stored once.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = {name: value.to(dtype).contiguous() for name, value in state.parameters.items()}
    weights.update({name: value.contiguous() for name, value in state.buffers.items()})
    optimizer = {name: value.contiguous() for name, value in state.moments.items()}
    if precision == "bf16":
        optimizer.update({f"{MASTER_PREFIX}{name}": value.contiguous() for name, value in state.parameters.items()})
    return weights, optimizer


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_text(path: Path, *, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)
