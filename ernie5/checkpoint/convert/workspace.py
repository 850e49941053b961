"""Where a conversion grows: a hidden directory beside its target, a journal of what is finished, and one rename.

A kill leaves the directory; the same command finds it, skips what the journal names, and goes on. Nothing stands under
the target's name before everything is on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ernie5.checkpoint.convert.source import STASH
from ernie5.checkpoint.manifest import FORMAT
from ernie5.checkpoint.names import MANIFEST_FILE
from ernie5.errors import CheckpointError, EnvironmentFault
from ernie5.observe.faults import refusal_of
from ernie5.tokenizers.kept import KEPT_FOLDER

JOURNAL = ".journal.jsonl"
LOCK = ".lock"
CONFIG_NAME = "config.json"
OWN_FOLDERS = (STASH, KEPT_FOLDER)


class Workspace:
    """The growing directory `folder` and its journal: one line per tensor whose bytes are on disk."""

    def __init__(self, folder: Path, *, fingerprint: str) -> None:
        self.folder = folder
        self._done = _read_journal(folder / JOURNAL, fingerprint=fingerprint)
        self.resumed = len(self._done)
        if not self._done:
            for path in folder.iterdir():
                if path.name != LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            _append(folder / JOURNAL, [{"fingerprint": fingerprint}])

    def is_done(self, file: str, tensor: str) -> bool:
        """Whether a tensor is finished."""
        return (file, tensor) in self._done

    def crc_of(self, file: str, tensor: str) -> int | None:
        """The CRC-32 of a finished tensor, None for one still to be written."""
        return self._done.get((file, tensor))

    def record(self, file: str, *, crcs: dict[str, int]) -> None:
        """Promise that these tensors of `file` are on disk."""
        _append(self.folder / JOURNAL, [{"file": file, "tensor": name, "crc32": crc} for name, crc in crcs.items()])
        self._done |= {(file, name): crc for name, crc in crcs.items()}


def _append(path: Path, values: list[dict[str, object]]) -> None:
    if values:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(value) + "\n" for value in values))
            file.flush()
            os.fsync(file.fileno())


def _read_journal(path: Path, *, fingerprint: str) -> dict[tuple[str, str], int]:
    """Finished tensors, empty where there is no journal of the same conversion; a torn last line does not count."""
    if not path.is_file():
        return {}
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not entries or entries[0].get("fingerprint") != fingerprint:
        return {}
    done = {(entry["file"], entry["tensor"]): int(entry["crc32"]) for entry in entries[1:]}
    return {key: crc for key, crc in done.items() if (path.parent / key[0]).is_file()}


def partial_folder(target: Path) -> Path:
    """Where the conversion to `target` grows."""
    return target.parent / f".{target.name}.converting"


def check_target(target: Path, *, source: Path, force: bool) -> None:
    """Raise CheckpointError unless `target` may be written: free, or `force` and something that a conversion wrote."""
    if source.resolve() == target.resolve() or source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} is or contains the source {source}, which would be lost. Choose another DST")
    if target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} lies inside of the source {source}. Choose another DST")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{target} exists and nothing is overwritten. Choose another DST, or give --force")
    own, hub = _read_object(target / MANIFEST_FILE), _read_object(target / CONFIG_NAME)
    if own.get("format") != FORMAT and not hub.keys() & {"architectures", "model_type"}:
        raise CheckpointError(
            f"{target} holds neither a checkpoint's {MANIFEST_FILE} nor a model's {CONFIG_NAME}, so it is no model: "
            "--force replaces converted models only. Remove it yourself or choose another DST"
        )
    strange = sorted(path.name for path in target.iterdir() if path.is_dir() and path.name not in OWN_FOLDERS)
    if strange:
        raise CheckpointError(
            f"{target} holds folders that no conversion writes ({', '.join(strange[:3])}), as a fine-tuning's folder "
            "does: --force would remove them with the model. Move them away or choose another DST"
        )


def _read_object(path: Path) -> dict[str, object]:
    """The object in a JSON file; nothing where there is none. Shards have a manifest.json and programs a config.json
    of their own."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


@contextlib.contextmanager
def growing(target: Path, *, is_continued: bool = True) -> Iterator[Path]:
    """The locked partial folder of `target`; two conversions to one place would mix their files. is_continued: the next
    call goes on from what is in it; else it goes where the disk refuses.

    Raises CheckpointError where another process holds it, EnvironmentFault where the disk refuses.
    """
    folder = partial_folder(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise EnvironmentFault(f"cannot write beside {target}: {refusal_of(error, place='another DST')}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process converts to {target}. Wait for it or choose another DST") from None
        try:
            yield folder
        except OSError as error:
            stands = f"What is done is kept in {folder}"
            if not is_continued:
                shutil.rmtree(folder, ignore_errors=True)
                stands = "What was written is removed, and nothing stands under that name that did not before"
            refusal = refusal_of(error, place="another DST")
            raise EnvironmentFault(f"writing {target} failed: {refusal.what}. {stands}. {refusal.way}") from error


def publish(folder: Path, *, target: Path) -> None:
    """Give the finished `folder` the name `target`; what stood there goes only when the new one stands."""
    for path in (folder / JOURNAL, folder / LOCK):
        path.unlink(missing_ok=True)
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = target.parent / f".{target.name}.replaced"
    if target.exists():
        _remove(old)
        target.rename(old)
    folder.rename(target)
    _remove(old)
    descriptor = os.open(target.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _remove(old: Path) -> None:
    """Remove what stood under the target's name; of a symbolic link the link alone, which rmtree would leave."""
    if old.is_symlink():
        old.unlink()
    shutil.rmtree(old, ignore_errors=True)
