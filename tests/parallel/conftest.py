"""Ranks as forked processes: quick to start, because torch is imported already."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

LONGEST_SECONDS = 120


def _forget_inherited_groups() -> None:
    """A forked rank must not believe in the groups of the tests that ran before it; their threads were not forked.

    They are kept, not destroyed: a destructor would wait for those threads.
    """
    world = distributed_c10d._world
    tables = (
        world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag, world.tags_to_pg,
    )
    multiprocessing.current_process().inherited_groups = [dict(table) for table in tables]
    distributed_c10d._update_default_pg(None)
    for table in tables:
        table.clear()


def _rank_main(function: Callable, rank: int, ranks: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    _forget_inherited_groups()
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
    return _runner(tmp_path)


@pytest.fixture(scope="module")
def run_ranks_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list]:
    """`run_ranks` for a fixture whose results several tests look at."""
    return _runner(tmp_path_factory.mktemp("ranks"))


def _runner(tmp_path: Path) -> Callable[..., list]:
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
