"""What a checkpoint says about itself, as JSON; and the small state of a run beside its tensors.

Torch-free: `ernie5 inspect` reads a checkpoint of any size in milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ernie5.checkpoint.names import MANIFEST_FILE
from ernie5.errors import CheckpointError

FORMAT = "ernie5-checkpoint"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor: its file, shape, dtype as safetensors names it, bytes, and the CRC-32 of its bytes."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file: size and SHA-256."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Index of a checkpoint. `tokenizers`: identity (sha256) by name; `tensors`: by key; `files`: by name."""

    step: int
    tokens: int
    precision: str
    tokenizers: dict[str, str]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]

    def to_json(self) -> str:
        """Readable JSON, keys in a fixed order."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"


@dataclasses.dataclass(frozen=True)
class RunState:
    """The part of a run's state that is not in the engine.

    step: optimizer steps attempted; tokens: seen, padding not counted; data: the loader's cursor, JSON values;
    rng: generator states as hexadecimal text by name; spikes: skipped steps in a row; recent_losses: what the loss
    alarm compares the next step with.
    """

    step: int
    tokens: int
    data: object
    rng: dict[str, str]
    spikes: int = 0
    recent_losses: list[float] = dataclasses.field(default_factory=list)


def read_manifest(directory: Path) -> Manifest:
    """Read `directory`/manifest.json. Raises CheckpointError for a missing, damaged or foreign one."""
    path = directory / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST_FILE}, so it is no complete checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Use another checkpoint") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of this program (format is not {FORMAT!r})")
    if values.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {values.get('version')}, this program reads {VERSION}. Use the version that wrote it"
        )
    try:
        return Manifest(
            step=int(values["step"]),
            tokens=int(values["tokens"]),
            precision=str(values["precision"]),
            tokenizers=dict(values["tokenizers"]),
            files={name: FileEntry(**entry) for name, entry in values["files"].items()},
            tensors={
                name: TensorEntry(**{**entry, "shape": tuple(entry["shape"])})
                for name, entry in values["tensors"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Use another checkpoint") from None
