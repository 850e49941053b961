"""Writing one safetensors file: streamed, hashed on the way, and with the interpreter free for the training loop.

The layout is that of the format's own writer (8 bytes of header length, JSON header, tensors by falling size of their
dtype and then by name), so files are equal byte for byte. Its writer copies every tensor into a bytes object first and
keeps the interpreter meanwhile; here `write`, SHA-256 and CRC-32 let other threads run, piece by piece.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import types
import zlib
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

import torch

from ernie5.checkpoint.manifest import FileEntry
from ernie5.errors import CheckpointError

PIECE_BYTES = 1 << 24
# By the names of safetensors: what checkpoints hold, and all that is read.
DTYPES: Mapping[str, torch.dtype] = types.MappingProxyType(
    {
        "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
        "U8": torch.uint8,
    }
)


METADATA_KEY = "__metadata__"


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor that a file is going to hold; dtype as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that exists only while it is written: `load` returns it on the CPU."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """What a manifest says of a file that was just written and synchronised: crcs: CRC-32 by tensor."""

    file: FileEntry
    crcs: dict[str, int]


def file_header(tensors: Iterable[NewTensor], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """What a file that holds `tensors` in this order begins with: the length of the JSON, and the JSON."""
    header: dict[str, object] = {METADATA_KEY: dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def begin_tensor_file(path: Path, *, tensors: Mapping[str, LazyTensor], now: Set[str]) -> None:
    """Write the tensors called `now` to their places in the new file `path`, with neither checksum nor flush: about as
    fast as a copy in memory, and the page cache holds it. `write_tensor_file` does the rest. Raises OSError."""
    order = _order(tensors)
    with path.open("wb", buffering=0) as file:
        for name, offset in zip(order, _offsets(tensors, order=order), strict=True):
            if name in now:
                os.lseek(file.fileno(), offset, os.SEEK_SET)
                _write_all(file.fileno(), _values(tensors[name]))


def write_tensor_file(
    path: Path, *, tensors: Mapping[str, LazyTensor], begun: Set[str] = frozenset()
) -> WrittenFile:
    """Write tensors, one in memory at a time, to the file `path`, flush it to disk, and return size and checksums.

    begun: tensors that `begin_tensor_file` has written; they are read back, in pieces, for their checksums. Else the
    file is new. Raises OSError.
    """
    order = _order(tensors)
    digest, crcs, header = hashlib.sha256(), {}, memoryview(_header(tensors, order=order))
    with path.open("r+b" if begun else "wb", buffering=0) as file:
        _write_all(file.fileno(), header, digest=digest)
        size = header.nbytes
        for name in order:
            if name in begun:
                crcs[name] = _read_back(file.fileno(), num_bytes=tensors[name].num_bytes, digest=digest)
            else:
                raw = _values(tensors[name])
                _write_all(file.fileno(), raw, digest=digest)
                crcs[name] = checksum(raw)
                del raw
            size += tensors[name].num_bytes
        os.fsync(file.fileno())
    return WrittenFile(FileEntry(num_bytes=size, sha256=digest.hexdigest()), {name: crcs[name] for name in tensors})


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def file_hash(path: Path) -> str:
    """SHA-256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(raw: memoryview) -> int:
    """CRC-32, piece by piece, so that other threads run meanwhile."""
    value = 0
    for start in range(0, raw.nbytes, PIECE_BYTES):
        value = zlib.crc32(raw[start : start + PIECE_BYTES], value)
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as safetensors names it. Raises CheckpointError for one that no checkpoint holds."""
    name = next((name for name, held in DTYPES.items() if held == dtype), None)
    if name is None:
        raise CheckpointError(f"a tensor of dtype {dtype} cannot be stored; a checkpoint holds {', '.join(DTYPES)}")
    return name


def _order(tensors: Mapping[str, LazyTensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _offsets(tensors: Mapping[str, LazyTensor], *, order: list[str]) -> list[int]:
    """First byte of each tensor in the file."""
    sizes = [tensors[name].num_bytes for name in order[:-1]]
    return list(itertools.accumulate(sizes, initial=len(_header(tensors, order=order))))[: len(order)]


def _values(tensor: LazyTensor) -> memoryview:
    return raw_bytes(tensor.load().to(tensor.dtype).contiguous())


def _header(tensors: Mapping[str, LazyTensor], *, order: list[str]) -> bytes:
    return file_header(NewTensor(name, dtype_name(tensors[name].dtype), tensors[name].shape) for name in order)


def _write_all(descriptor: int, raw: memoryview, *, digest: hashlib._Hash | None = None) -> None:
    for start in range(0, raw.nbytes, PIECE_BYTES):
        piece = raw[start : start + PIECE_BYTES]
        if digest is not None:
            digest.update(piece)
        while piece.nbytes:  # a nearly full disk writes less than it was given
            piece = piece[os.write(descriptor, piece) :]


def _read_back(descriptor: int, *, num_bytes: int, digest: hashlib._Hash) -> int:
    """CRC-32 of the next bytes of a file, which go into `digest` too; marks the file as worked on."""
    buffer, crc, left = memoryview(bytearray(min(PIECE_BYTES, num_bytes))), 0, num_bytes
    while left:
        count = os.readv(descriptor, [buffer[:left]])
        if count == 0:
            raise OSError(errno.EIO, "a file became shorter while its checksums were computed")
        digest.update(buffer[:count])
        crc = zlib.crc32(buffer[:count], crc)
        left -= count
        os.utime(descriptor)  # nothing grows: rank 0 sees by the time that this rank is alive
    return crc
