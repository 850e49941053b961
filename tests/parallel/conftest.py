"""Ranks as forked processes: quick to start, because torch is imported already."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

LONGEST_SECONDS = 120


def _rank_main(function: Callable, rank: int, ranks: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        result = function(*arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list]:
    """`run_ranks(function, ranks, *arguments)`: what the function returned on every rank of a gloo group."""
    calls: list[Path] = []

    def run(function: Callable, ranks: int, *arguments: object) -> list:
        folder = tmp_path / f"call{len(calls)}"
        folder.mkdir()
        calls.append(folder)
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_rank_main, args=(function, rank, ranks, str(folder), arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LONGEST_SECONDS)
        alive = [process for process in processes if process.is_alive()]
        for process in alive:
            process.kill()
        assert not alive, "ranks hang"
        results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
        failures = [result for result in results if isinstance(result, str)]
        assert not failures, "\n".join(failures)
        return results

    return run
