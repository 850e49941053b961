"""Does a manifest say what its files hold? Checksums cannot tell: they are in the manifest, which has none itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ernie5.checkpoint.manifest import Manifest, SliceEntry, TensorEntry, name_in_file
from ernie5.checkpoint.names import CONFIG_FILE, MASTER_PREFIX, STATE_FILE
from ernie5.checkpoint.tensor_slices import ITEM_BYTES, TensorPlace, read_header
from ernie5.errors import CheckpointError

SUFFIX = ".safetensors"


def needed_files(manifest: Manifest) -> tuple[str, ...]:
    """The files that loading needs: weights alone need no state."""
    return (CONFIG_FILE, STATE_FILE) if _has_optimizer(manifest) else (CONFIG_FILE,)


def find_disagreement(directory: Path, *, manifest: Manifest) -> list[str]:
    """One sentence per statement of the manifest that its files contradict, and per tensor that only one side knows;
    empty where they agree. The files must be whole: only headers and state.json are read."""
    wanted: dict[str, dict[str, tuple[TensorEntry, SliceEntry]]] = {n: {} for n in manifest.files if n.endswith(SUFFIX)}
    for key, entry in manifest.tensors.items():
        for part in entry.slices:
            wanted.setdefault(part.file, {})[name_in_file(key, entry=entry, part=part)] = (entry, part)
    found = []
    for file, slices in wanted.items():
        try:
            places = read_header(directory / file)
        except CheckpointError as error:
            found.append(str(error))
            continue
        found += [line for name in {**slices, **places} if (line := _compare(name, slices=slices, places=places))]
    extra = sorted(path.name for path in directory.glob(f"*{SUFFIX}") if path.name not in wanted)
    found += [f"{name} holds tensors and is not in the manifest" for name in extra]
    found += [
        f"the manifest says that {key} of shape {list(entry.shape)} {entry.dtype} has {entry.num_bytes} bytes"
        for key, entry in manifest.tensors.items()
        if entry.num_bytes != math.prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 0)
    ]
    found += _compare_state(directory, manifest=manifest)
    return [f"{directory} and its manifest disagree: {line}" for line in found]


def _compare(
    name: str, *, slices: dict[str, tuple[TensorEntry, SliceEntry]], places: dict[str, TensorPlace]
) -> str | None:
    if name not in slices:
        return f"{places[name].path.name} holds {name}, which the manifest does not know"
    entry, part = slices[name]
    said = f"the manifest says that {part.file} holds {name} of shape {list(part.shape)} {entry.dtype}, and the file"
    if name not in places:
        return f"{said} does not"
    place = places[name]
    if (place.shape, place.dtype) != (part.shape, entry.dtype):
        return f"{said} holds {list(place.shape)} {place.dtype}"
    return None


def _compare_state(directory: Path, *, manifest: Manifest) -> list[str]:
    found = []
    if STATE_FILE in manifest.files:
        try:
            run = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))["run"]
            pairs = [(name, vars(manifest)[name], run[name]) for name in ("step", "tokens")]
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            return [f"{STATE_FILE} is no state of a run ({error!r})"]
        found = [f"{name} is {said} there and {held} in {STATE_FILE}" for name, said, held in pairs if said != held]
    held = "bf16" if _is_bf16(manifest) else "fp32"
    if manifest.precision != held:
        found.append(f"precision is {manifest.precision} there, and the tensors are those of {held}")
    return found


def _is_bf16(manifest: Manifest) -> bool:
    """With an optimizer: whether masters are stored beside the weights; of weights alone, what most bytes are."""
    if _has_optimizer(manifest):
        return any(key.startswith(MASTER_PREFIX) for key in manifest.tensors)
    totals: dict[str, int] = {}
    for entry in manifest.tensors.values():
        totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.num_bytes
    return max(totals, key=lambda dtype: totals[dtype], default="") == "BF16"


def _has_optimizer(manifest: Manifest) -> bool:
    return any("/" in key for key in manifest.tensors)
