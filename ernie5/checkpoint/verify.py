"""`ernie5 verify CKPT`: does every byte of a checkpoint still match its checksum?

Reads each file once for its SHA-256; only a file that does not match is read again, tensor by tensor, for the CRC-32
that names what is damaged. Memory stays at one block. Where all of them match, the
manifest is compared with what the files say. A model directory of a foreign format has no checksums: its
headers, index and config are compared instead, which finds what is cut off, missing or of the wrong shape.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

from ernie5.checkpoint.agreement import find_disagreement, needed_files
from ernie5.checkpoint.manifest import Manifest, SliceEntry, name_in_file, read_manifest
from ernie5.checkpoint.names import (
    CONFIG_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    find_checkpoint,
    is_optimizer_file,
    latest_checkpoint,
    list_checkpoints,
    step_of,
)
from ernie5.checkpoint.places import checkpoint_folders
from ernie5.checkpoint.tensor_file import file_hash
from ernie5.checkpoint.tensor_slices import TensorPlace, read_header
from ernie5.config.arguments import CommandParser
from ernie5.errors import EXIT_DONE, CheckpointError

BLOCK_BYTES = 1 << 24
LISTED_TENSORS = 8


def main(argv: Sequence[str]) -> int:
    """Run the verb: exit code 0 where everything is whole; raises CheckpointError (exit code 2) naming all damage, and
    the newest checkpoint that is whole."""
    parser = CommandParser(
        prog="ernie5 verify",
        description="Compare checkpoints with their checksums: the one that is given, or all of a run.",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint, folder of checkpoints, run or model directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every checkpoint of a folder or run: the default for them")
    which.add_argument("--latest", action="store_true", help="of a folder or run, only the one that `latest` names")
    options = parser.parse_args(argv)
    if _is_foreign(options.checkpoint):
        print(_verify_foreign(options.checkpoint))
        return EXIT_DONE
    chosen = [find_checkpoint(options.checkpoint)] if options.latest else _chosen(options.checkpoint)
    damage, whole = [], []
    for directory in chosen:
        try:
            manifest = read_manifest(directory)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        found = _find_problems(directory, manifest=manifest)
        damage += found
        if not found:
            total = sum(entry.num_bytes for entry in manifest.files.values())
            print(f"{directory}: whole. {len(manifest.files)} files, {len(manifest.tensors)} tensors, {total:,} bytes")
            whole.append(directory)
    if damage:
        newest = max(whole, key=lambda directory: step_of(directory.resolve().name) or 0, default=None)
        good = f". The newest that is whole is {newest}" if whole else ". None is whole" if len(chosen) > 1 else ""
        raise CheckpointError("; ".join(damage) + good)
    return EXIT_DONE


def _chosen(path: Path) -> list[Path]:
    """A checkpoint itself, or all of a folder or run, also those without a manifest and whatever `latest` says."""
    if step_of(path.resolve().name) is not None or (path / MANIFEST_FILE).is_file():
        return [path]
    for folder in checkpoint_folders(path):
        found = list_checkpoints(folder)
        elsewhere = latest_checkpoint(folder)
        if found or elsewhere:
            return found if elsewhere is None or elsewhere in found else [*found, elsewhere]
    return [find_checkpoint(path)]


def is_whole(directory: Path) -> bool:
    """Whether every byte of a checkpoint is as its manifest says, and a run can go on from it."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError:
        return False
    missing = find_missing(directory, manifest=manifest, needed=(STATE_FILE, CONFIG_FILE))
    return not missing and not _find_problems(directory, manifest=manifest)


def _find_problems(directory: Path, *, manifest: Manifest) -> list[str]:
    """Damage; of files that are as the manifest says, what these then contradict it in."""
    lacking = [name for name in needed_files(manifest) if name not in manifest.files]
    damage = [f"{directory} needs {name}, and its manifest does not list it" for name in lacking]
    damage += find_damage(directory, manifest=manifest)
    return damage or find_disagreement(directory, manifest=manifest)


def find_missing(directory: Path, *, manifest: Manifest, needed: Sequence[str] = ()) -> list[str]:
    """One sentence per file that is absent, of another size than the manifest says, or not in it although `needed` or
    said to hold tensors; reads sizes alone."""
    damage = []
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            damage.append(f"{path} is missing")
        elif path.stat().st_size != entry.num_bytes:
            damage.append(
                f"{path} has {path.stat().st_size} bytes, the manifest says {entry.num_bytes}: it is cut off or was "
                f"replaced{_lost(path, file=name, manifest=manifest)}"
            )
    damage += [f"{directory / name} is missing" for name in needed if name not in manifest.files]
    held = {name for entry in manifest.tensors.values() for name in entry.files}
    damage += [f"{directory / name} holds tensors but has no checksum" for name in sorted(held - set(manifest.files))]
    return damage


def find_damage(
    directory: Path, *, manifest: Manifest, with_optimizer: bool = True, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """One sentence per file that does not match the manifest, naming damaged tensors; empty where all is whole.

    share (r, n): look at every n-th file from number r on; the others are some other rank's.
    """
    wanted = {k: v for k, v in manifest.files.items() if with_optimizer or not is_optimizer_file(k)}
    own = dict(list(wanted.items())[share[0] :: share[1]])
    part = dataclasses.replace(manifest, files=own)
    damage = [line for line in find_missing(directory, manifest=part) if "has no checksum" not in line]
    if share[0] == 0:
        damage += [line for line in find_missing(directory, manifest=manifest) if "has no checksum" in line]
    for name, entry in own.items():
        path = directory / name
        if path.is_file() and path.stat().st_size == entry.num_bytes and file_hash(path) != entry.sha256:
            damage.append(f"{path} does not match its checksum{_damaged(path, file=name, manifest=manifest)}")
    return damage


def _slices_in(file: str, *, manifest: Manifest) -> dict[str, SliceEntry]:
    """The slices that a file holds, by their names in it."""
    return {
        name_in_file(key, entry=entry, part=part): part
        for key, entry in manifest.tensors.items()
        for part in entry.slices
        if part.file == file
    }


def _damaged(path: Path, *, file: str, manifest: Manifest) -> str:
    wanted = _slices_in(file, manifest=manifest)
    if not wanted:
        return ""
    try:
        places = read_header(path)
    except CheckpointError as error:
        return f", its header is damaged ({error})"
    gone = [name for name in wanted if name not in places or places[name].shape != wanted[name].shape]
    bad = gone + [n for n, entry in wanted.items() if n not in gone and tensor_crc(places[n]) != entry.crc32]
    return _listed(bad) if bad else ", in its header or between tensors"


def _lost(path: Path, *, file: str, manifest: Manifest) -> str:
    """The tensors that a file of the wrong size no longer holds in full."""
    if not _slices_in(file, manifest=manifest):
        return ""
    size = path.stat().st_size
    try:
        places = read_header(path, may_be_cut=True)
    except CheckpointError:
        return ", its header is gone"
    lost = [name for name, place in places.items() if place.stop > size]
    return _listed(lost) if lost else ""


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:LISTED_TENSORS])
    more = f" and {len(names) - LISTED_TENSORS} more" if len(names) > LISTED_TENSORS else ""
    return f" (damaged: {shown}{more})"


def tensor_crc(place: TensorPlace) -> int:
    """CRC-32 of a tensor's bytes, block by block."""
    crc, left = 0, place.num_bytes
    with place.path.open("rb") as file:
        file.seek(place.start)
        while left:
            block = file.read(min(BLOCK_BYTES, left))
            if not block:
                break
            crc = zlib.crc32(block, crc)
            left -= len(block)
    return crc


def _is_foreign(path: Path) -> bool:
    return (path / "config.json").is_file() and not (path / MANIFEST_FILE).is_file()


def _verify_foreign(path: Path) -> str:
    from ernie5.checkpoint.convert.source import open_source

    source = open_source(path)
    files = {location.place.path for location in source.pieces.values()}
    return (
        f"{path}: {source.format}, {len(files)} files, {len(source.pieces)} pieces, all there and of the right shape. "
        "This format has no checksums, so flipped bytes cannot be seen"
    )
