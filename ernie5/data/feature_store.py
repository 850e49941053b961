"""Frozen features on disk, shared by all ranks, workers and runs of a machine, so that a medium is encoded once.

An entry is a file named by the sha256 of all that decides its content: the medium's bytes, what is computed from them,
sizes, tokenizers, and the torch build whose rounding it carries. Entries appear whole or not at all (written aside,
then renamed); one that is damaged counts as missing and is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import torch

LOG = logging.getLogger(__name__)
MAGIC = b"ernie5f2"  # another number makes old entries missing: do so where decode.py changes what it returns
HEAD = struct.Struct("<8sII")  # magic, crc32 of all that follows it, bytes of the description
DTYPES = ("uint8", "int64", "float32")
KEEP_SHARE = 0.8


def store_folder(name: str) -> Path | None:
    """The folder that data.feature_cache names: `user` is $XDG_CACHE_HOME/ernie5/features, `none` is no folder."""
    if name == "none":
        return None
    if name == "user":
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie5" / "features"
    return Path(name)


class FeatureStore:
    """Lists of tensors by key, at most `max_bytes` on disk. Safe for threads and processes.

    A folder that is full when opened loses its oldest entries; one that fills up, or cannot be written, takes no more.
    """

    def __init__(self, folder: Path, *, max_bytes: int, context: str) -> None:
        self._folder, self._context = folder, context.encode()
        self._lock = threading.Lock()
        self._room = max_bytes - _shrink(folder, max_bytes=max_bytes)

    def key_of(self, content: bytes, *, purpose: str) -> str:
        """The name of what `purpose` makes of a medium with these bytes."""
        return hashlib.sha256(b"\0".join([self._context, purpose.encode(), content])).hexdigest()

    def read(self, key: str) -> list[torch.Tensor] | None:
        """The tensors under `key`, None when there is no whole entry."""
        try:
            data = self._path(key).read_bytes()
            return _unpack(data)
        except (OSError, ValueError, TypeError, struct.error):
            return None

    def write(self, key: str, tensors: list[torch.Tensor]) -> None:
        """Keep `tensors` (uint8, int64 or fp32) under `key`, where there is room for them."""
        data, path = _pack(tensors), self._path(key)
        with self._lock:
            if self._room < len(data):
                return
            self._room -= len(data)
        aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(data)
            os.replace(aside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            with self._lock:
                self._room, first = -1, self._room >= 0
            if first:
                LOG.warning("features are not kept in %s from here on: %s", self._folder, error)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key[2:]


def _shrink(folder: Path, *, max_bytes: int) -> int:
    """Bytes in use, after the oldest entries have gone where they were more than max_bytes."""
    found = []
    for directory in (folder / f"{number:02x}" for number in range(256)):
        try:
            found += [(entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(directory)]
        except OSError:  # not made yet, or another process removed an entry
            continue
    used = sum(size for _, size, _ in found)
    if used <= max_bytes:
        return used
    for _, size, path in sorted(found):
        if used <= KEEP_SHARE * max_bytes:
            break
        Path(path).unlink(missing_ok=True)
        used -= size
    return used


def _pack(tensors: list[torch.Tensor]) -> bytes:
    arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in tensors]
    described = json.dumps([[str(array.dtype), array.shape] for array in arrays]).encode()
    body = b"".join([described, *(array.tobytes() for array in arrays)])
    return HEAD.pack(MAGIC, zlib.crc32(body), len(described)) + body


def _unpack(data: bytes) -> list[torch.Tensor]:
    """Raises ValueError for anything that `_pack` did not write."""
    magic, checksum, length = HEAD.unpack_from(data)
    body = memoryview(data)[HEAD.size :]
    if magic != MAGIC or zlib.crc32(body) != checksum:
        raise ValueError("damaged")
    tensors, offset = [], length
    for name, shape in json.loads(bytes(body[:length])):
        if name not in DTYPES:
            raise ValueError(f"an entry of {name}")
        array = np.frombuffer(body, dtype=name, count=int(np.prod(shape)), offset=offset).reshape(shape)
        tensors.append(torch.from_numpy(array.copy()))
        offset += array.nbytes
    return tensors
