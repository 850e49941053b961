"""Starting DeepSpeed: process group with or without a launcher, its log into a file, no compilation at start."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from ernie5.parallel.state import join_processes


def import_deepspeed(log_path: Path) -> None:
    """Import DeepSpeed with its messages in `log_path`.

    The import probes which operators could be compiled, and the linker complains on file descriptor 2 about libraries
    that are absent; nothing of that concerns a run.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log_path.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            importlib.import_module("deepspeed")
        finally:
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
    _log_to_file(log_path)
    _import_muon_uncompiled()
    # DeepSpeed calls collectives by names that torch has replaced; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)


def start_processes(device: torch.device, *, log_path: Path) -> None:
    """Join the process group of the launcher, or make a group of one that needs no port.

    With a launcher, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set; without, the store lives in
    memory.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed(log_path)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    join_processes(device)
    _join_deepspeed()


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, which it does for every ZeRO run and nobody uses here (optim/muon.py is ours).

    Its functions are decorated with torch.compile, and that loads the whole compiler: 3 s of CPU per process.
    """
    whole = torch.compile
    torch.compile = lambda *functions, **_: functions[0] if functions else lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = whole


def _log_to_file(path: Path) -> None:
    from deepspeed.utils import logger

    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


def _join_deepspeed() -> None:
    """Give DeepSpeed the existing process group, without its shared-memory op.

    That op serves collectives of tensor-parallel inference on one host, which training never calls, and compiling it
    takes 78 s at the first start on two cores.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
