"""Masters and moments of ZeRO-3 in files on a local drive that are mapped into memory.

The optimizer steps them where they are, as it does on the host: the system reads a page when it is touched, and writes
it back and forgets it when memory is short. The files have no name any more once they are mapped, so that they go with
the process however it ends. Their blocks are allocated at once: a drive that fills up later would end the process with
SIGBUS.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ernie5.errors import EnvironmentFault
from ernie5.observe.faults import refusal_of

GIB = 2**30


def map_tensors(tensors: Iterable[torch.Tensor], *, folder: Path) -> None:
    """Give each tensor, on the CPU and contiguous, a file under `folder` for its memory; its values stay.

    Raises EnvironmentFault where the file cannot be made.
    """
    for tensor in tensors:
        if tensor.numel():
            tensor.data = _mapped(tensor.detach(), folder=folder)


def _mapped(tensor: torch.Tensor, *, folder: Path) -> torch.Tensor:
    num_bytes = tensor.numel() * tensor.element_size()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(prefix="ernie5-", suffix=".state", dir=folder)
        try:
            os.posix_fallocate(handle, 0, num_bytes)
            storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=num_bytes)
        finally:
            os.close(handle)
            os.unlink(path)
    except OSError as error:
        raise EnvironmentFault(
            f"engine.nvme_path = {folder} cannot take {num_bytes / GIB:.3f} GiB of optimizer state: "
            f"{refusal_of(error).what}. "
            "Every rank keeps 12 bytes there per parameter of its part. Set engine.nvme_path to a folder on a local "
            "drive with room for them, or engine.offload_optimizer: cpu"
        ) from error
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(storage, 0, tensor.shape, tensor.stride()).copy_(tensor)
