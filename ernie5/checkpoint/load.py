"""Reading a checkpoint: strict, checksummed, and with every mismatch named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ernie5.checkpoint.manifest import Manifest, RunState, read_manifest
from ernie5.checkpoint.names import (
    CONFIG_FILE,
    MASTER_PREFIX,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    find_checkpoint,
    list_checkpoints,
)
from ernie5.checkpoint.tensor_file import describe_tensor, file_hash
from ernie5.config.base import Config
from ernie5.config.load import load_config
from ernie5.config.registry import resolve
from ernie5.engine.interface import EngineState, check_names
from ernie5.errors import CheckpointError, TokenizerError
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.tokenizers.kept import KEPT_FOLDER

RUN_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, CONFIG_FILE)


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A checkpoint's whole content; `directory` is where it was found."""

    directory: Path
    manifest: Manifest
    engine: EngineState
    run: RunState


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate or generate, its training configuration (RootConfig), the manifest, and where they were
    found."""

    model: UnifiedModel
    config: Config
    manifest: Manifest
    directory: Path


def load_run(path: Path | str) -> LoadedRun:
    """Read everything that resuming needs, after checking the checksums of all files.

    Raises CheckpointError naming the damaged file and tensor.
    """
    directory = find_checkpoint(path)
    manifest = _read_verified(directory, names=RUN_FILES)
    weights = _read_tensors(directory, file=MODEL_FILE)
    optimizer = _read_tensors(directory, file=OPTIMIZER_FILE)
    run, updates, magnitudes = _read_state(directory)
    trained = {key.split("/", 1)[1] for key in optimizer}
    buffers = {name: value for name, value in weights.items() if name not in trained}
    if manifest.precision == "bf16":
        parameters = {
            key.removeprefix(MASTER_PREFIX): value for key, value in optimizer.items() if key.startswith(MASTER_PREFIX)
        }
    else:
        parameters = {name: value for name, value in weights.items() if name in trained}
    moments = {key: value for key, value in optimizer.items() if not key.startswith(MASTER_PREFIX)}
    engine = EngineState(
        parameters=parameters, buffers=buffers, moments=moments, updates=updates, magnitudes=magnitudes
    )
    return LoadedRun(directory=directory, manifest=manifest, engine=engine, run=run)


def load_model(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Read the model of the checkpoint at `path` (checkpoint, checkpoint folder or run directory), in eval mode.

    dtype: of the parameters, by default as stored; buffers stay fp32. Raises CheckpointError.
    """
    directory = find_checkpoint(path)
    manifest = _read_verified(directory, names=(MODEL_FILE, CONFIG_FILE))
    config = load_config(directory / CONFIG_FILE, schema=resolve("root", name="train"))
    model = build_model(config.model, seed=0)
    weights = _read_tensors(directory, file=MODEL_FILE)
    parameters = dict(model.named_parameters())
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in parameters}
    own.update({name: value for name, value in model.named_buffers() if name in model.state_dict()})
    check_names(weights, expected=own, what="tensors")
    with torch.no_grad():
        for name, tensor in own.items():
            if name in parameters:
                parameters[name].data = weights[name].to(dtype or weights[name].dtype)
            else:
                tensor.copy_(weights[name])
    return LoadedModel(model=model.to(device).eval(), config=config, manifest=manifest, directory=directory)


def verify_files(directory: Path, *, manifest: Manifest, names: tuple[str, ...]) -> None:
    """Compare sizes and SHA-256 of the named files; raises CheckpointError naming the file and, if any, the tensor."""
    for name in names:
        path, entry = directory / name, manifest.files.get(name)
        if entry is None or not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry.num_bytes:
            raise CheckpointError(
                f"{path} has {size} bytes, the manifest says {entry.num_bytes}: the file is damaged"
            )
        if file_hash(path) != entry.sha256:
            raise CheckpointError(
                f"{path} does not match its checksum{_damaged_tensors(directory, file=name, manifest=manifest)}: "
                "the file is damaged"
            )


def check_tokenizers(manifest: Manifest, *, identities: dict[str, str]) -> None:
    """Raise TokenizerError unless every tokenizer is the one that the checkpoint was trained with."""
    wrong = [name for name, identity in identities.items() if manifest.tokenizers.get(name, identity) != identity]
    if wrong:
        texts = ", ".join(f"{n}: {manifest.tokenizers[n][:12]} trained, {identities[n][:12]} given" for n in wrong)
        raise TokenizerError(
            f"this checkpoint was trained with other tokenizers ({texts}). Ids would mean other things. "
            f"`embedded` is the set of the installed version. Put the run's own, RUN_DIR/{KEPT_FOLDER}, beside the "
            "folder of its checkpoints, or use the version of ernie5 that trained it, or start over with --fresh"
        )


def kept_folders(directory: Path) -> tuple[Path, ...]:
    """Where the run of the checkpoint `directory` may have kept its tokenizers: beside the folder of checkpoints."""
    return (directory.absolute().parent.parent / KEPT_FOLDER,)


def _read_verified(directory: Path, *, names: tuple[str, ...]) -> Manifest:
    """The manifest, once the named files agree with it; else a CheckpointError that names the way out."""
    try:
        manifest = read_manifest(directory)
        verify_files(directory, manifest=manifest, names=names)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_way_out(directory)}") from error
    return manifest


def _way_out(directory: Path) -> str:
    """The newest other checkpoint of the folder that is whole, and the command that resumes from it."""
    directory = directory.absolute()
    for other in reversed(list_checkpoints(directory.parent)):
        if other.name == directory.name:
            continue
        try:
            verify_files(other, manifest=read_manifest(other), names=RUN_FILES)
        except CheckpointError:
            continue
        config = directory.parent.parent / CONFIG_FILE
        command = f"ernie5 train {config if config.is_file() else 'CONFIG'} --resume {other}"
        return f"The newest other checkpoint that is whole is {other}. Resume from it: {command}"
    return f"No other checkpoint of {directory.parent} is whole: bring one back, or start over with --fresh"


def _damaged_tensors(directory: Path, *, file: str, manifest: Manifest) -> str:
    try:
        tensors = load_file(directory / file)
    except (SafetensorError, OSError, ValueError):
        return ""
    damaged = [
        key
        for key, value in tensors.items()
        if key in manifest.tensors and describe_tensor(value, file=file).crc32 != manifest.tensors[key].crc32
    ]
    return f" (damaged: {', '.join(damaged[:5])})" if damaged else ""


def _read_tensors(directory: Path, *, file: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(directory / file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / file} cannot be read: {error}. Use another checkpoint") from error


def _read_state(directory: Path) -> tuple[RunState, int, torch.Tensor]:
    values = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    engine = values["engine"]
    magnitudes = torch.tensor(engine["magnitudes"], dtype=torch.float64)
    return RunState(**values["run"]), int(engine["updates"]), magnitudes
