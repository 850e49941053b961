"""What a checkpoint says about itself, as JSON; and the small state of a run beside its tensors.

Torch-free: `ernie5 inspect` reads a checkpoint of any size in milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ernie5.checkpoint.names import MANIFEST_FILE
from ernie5.errors import CheckpointError
from ernie5.parallel.boxes import Box, covers, whole_box

FORMAT = "ernie5-checkpoint"
VERSION = 2
OLDEST_VERSION = 1
DTYPES_HELD = ("F64", "F32", "BF16", "F16", "I64", "U8")  # tensor_file.py says what they are


@dataclasses.dataclass(frozen=True)
class SliceEntry:
    """One slice of a tensor: the file that holds it, its box in the whole tensor, and the CRC-32 of its bytes."""

    file: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int

    @property
    def box(self) -> Box:
        """Its box in the whole tensor."""
        return Box(self.start, self.shape)


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor: whole shape, dtype as safetensors names it, bytes, and the slices that it is stored in."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    slices: tuple[SliceEntry, ...]

    @property
    def files(self) -> set[str]:
        """The files that hold parts of it."""
        return {part.file for part in self.slices}


def name_in_file(key: str, *, entry: TensorEntry, part: SliceEntry) -> str:
    """How a slice is called in its safetensors file: as the tensor where it is whole, else `NAME[0:4,8:16]`."""
    return slice_name(key, box=part.box, shape=entry.shape)


def slice_name(key: str, *, box: Box, shape: tuple[int, ...]) -> str:
    """The name in a file of the slice `box` of the tensor `key` of `shape`."""
    return key if box == whole_box(shape) else f"{key}{box.describe()}"


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file: size and SHA-256."""

    num_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Index of a checkpoint. `tokenizers`: identity (sha256) by name; `tensors`: by key; `files`: by name. part_of:
    of the part that one host keeps in memory, the name that all hosts' parts of one save share; its slices need not
    make up the tensors."""

    step: int
    tokens: int
    precision: str
    tokenizers: dict[str, str]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    part_of: str = ""

    def to_json(self) -> str:
        """Readable JSON, keys in a fixed order, one line per tensor."""
        values = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        if not self.part_of:
            del values["part_of"]
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in values.pop("tensors").items()]
        tensors = ",\n".join(lines)
        return json.dumps(values, indent=1).removesuffix("\n}") + f',\n "tensors": {{\n{tensors}\n }}\n}}\n'


@dataclasses.dataclass(frozen=True)
class RunState:
    """The part of a run's state that is not in the engine.

    step: optimizer steps attempted; tokens: seen, padding not counted; data: the loader's cursor, JSON values;
    rng: generator states as hexadecimal text by name; spikes: skipped steps in a row; recent_losses: what the loss
    alarm compares the next step with; routing: counts since the last line of routing.jsonl, None for none.
    """

    step: int
    tokens: int
    data: object
    rng: dict[str, str]
    spikes: int = 0
    recent_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    routing: list | None = None


def read_manifest(directory: Path) -> Manifest:
    """Read `directory`/manifest.json. Raises CheckpointError for a missing, damaged or foreign one."""
    path = directory / MANIFEST_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST_FILE}, so it is no complete checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Use another checkpoint") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of this program (format is not {FORMAT!r})")
    version = values.get("version")
    if version not in range(OLDEST_VERSION, VERSION + 1):
        raise CheckpointError(
            f"{path} has version {version}, this program reads {OLDEST_VERSION} to {VERSION}. Use the version that "
            "wrote it"
        )
    part_of = str(values.get("part_of", ""))
    try:
        return Manifest(
            step=int(values["step"]),
            tokens=int(values["tokens"]),
            precision=str(values["precision"]),
            tokenizers={kind: _text(identity) for kind, identity in values["tokenizers"].items()},
            files={name: FileEntry(int(e["num_bytes"]), _text(e["sha256"])) for name, e in values["files"].items()},
            tensors={n: read_entry(n, entry, is_part=bool(part_of)) for n, entry in values["tensors"].items()},
            part_of=part_of,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Use another checkpoint") from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def read_entry(name: str, values: dict, /, *, is_part: bool = False) -> TensorEntry:
    """The entry of a tensor out of JSON values; those of version 1 are one whole slice. Raises ValueError where the
    slices are not the tensor (of one rank's part they need not be), and KeyError or TypeError for other damage."""
    shape, dtype = tuple(int(size) for size in values["shape"]), _text(values["dtype"])
    if dtype not in DTYPES_HELD:
        raise ValueError(f"{name} is of dtype {dtype}; a checkpoint holds {', '.join(DTYPES_HELD)}")
    found = values.get("slices") or [
        {"file": values["file"], "start": [0] * len(shape), "shape": shape, "crc32": values["crc32"]}
    ]
    slices = tuple(
        SliceEntry(str(v["file"]), tuple(map(int, v["start"])), tuple(map(int, v["shape"])), int(v["crc32"]))
        for v in found
    )
    if not is_part and not covers(shape, boxes=[part.box for part in slices]):
        boxes = ", ".join(part.box.describe() for part in slices)
        raise ValueError(f"the slices {boxes} do not make up {name} of shape {list(shape)}")
    return TensorEntry(shape, dtype, int(values["num_bytes"]), slices)
