"""Names on disk: directories of steps, files in them, keys of tensors. Keys are global; files may be one per rank."""

from __future__ import annotations

import re
from pathlib import Path

from ernie5.checkpoint.places import checkpoint_folders
from ernie5.errors import CheckpointError

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
LATEST_FILE = "latest"
NATIVE_FOLDER = "deepspeed"  # beside the checkpoints: what checkpoint.format = deepspeed writes
MASTER_PREFIX = "master/"
STEP_PATTERN = re.compile(r"step-(\d{8,18})")


def rank_file(name: str, *, rank: int, ranks: int) -> str:
    """The file of one of `ranks` writers: `model.safetensors` of a single one, else `model-00003.safetensors`."""
    return name if ranks == 1 else name.replace(".", f"-{rank:05d}.")


def is_optimizer_file(name: str) -> bool:
    """Whether a file of tensors holds optimizer state."""
    return name.startswith(OPTIMIZER_FILE.removesuffix(".safetensors"))


def step_name(step: int) -> str:
    """Directory name of a checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a directory name, None for any other name."""
    match = STEP_PATTERN.fullmatch(name)
    return int(match.group(1)) if match else None


def find_checkpoint(path: Path | str) -> Path:
    """Return the checkpoint directory meant by `path`: itself, or the `latest` of a directory or run directory
    (of RUN_DIR/config.yaml's checkpoint.dir, where that is set).

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).is_file():
        return path
    for folder in checkpoint_folders(path):
        newest = latest_checkpoint(folder)
        if newest is not None:
            return newest
    if not path.exists():
        raise CheckpointError(f"{path} does not exist. Give a checkpoint, a directory of them, or a run directory")
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is a model directory of another format. Import it first: ernie5 convert {path} DST --to ernie5"
        )
    raise CheckpointError(
        f"{path} holds no checkpoint. Expected a directory with {MANIFEST_FILE}, a directory of step-* checkpoints, or "
        "a run directory. List the run directory to see what is there"
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder`/latest names, or, if that file is gone, stale or damaged, the newest
    complete one."""
    named = _named_by(folder / LATEST_FILE)
    if named is not None and step_of(named.name) is not None and (named / MANIFEST_FILE).is_file():
        return named
    complete = [path for path in list_checkpoints(folder) if (path / MANIFEST_FILE).is_file()]
    return complete[-1] if complete else None


def _named_by(marker: Path) -> Path | None:
    """What the file `latest` names, None where it is gone or holds no text."""
    try:
        return marker.parent / marker.read_text(encoding="utf-8").strip() if marker.is_file() else None
    except UnicodeDecodeError:
        return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories in `folder`, oldest first; temporary ones are not listed."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path.name) is not None]
    return sorted(found, key=lambda path: step_of(path.name) or 0)
