"""Tile sizes tried on the device: the best of each shape, and what is chosen today, as tune.json and on the screen.

Candidates are compiled first by several processes into Triton's cache, since the compiler takes seconds for each.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from contest import normal
from masks import FLAGSHIP as FLAGSHIP_HEADS
from masks import MASKS, SMALL, Heads, intervals_of
from measure import Stopwatch, difference
from products import FLAGSHIP, QUICK, Groups, ends_of

from ernie5_kernels.attention import operator
from ernie5_kernels.attention.kernel import AttentionBlocks, choose_blocks
from ernie5_kernels.grouped_gemm.kernel import multiply_outer, multiply_rows, outer_tiles
from ernie5_kernels.grouped_gemm.tiles import GemmTiles, choose_tiles
from ernie5_kernels.launch import capability_of

Tiles = GemmTiles | AttentionBlocks
COMPILERS = 14
SHARED_BYTES = 227 << 10  # of a block on H100
TUNED = (0, 2, 3, 4)  # even load, mean 256, mean 32, small


def run(*, folder: Path, only: Sequence[str], quick: bool, budget: float) -> int:
    """Try all, print the best, write tune.json."""
    began, watch, results = time.monotonic(), Stopwatch(rounds=7), []
    subjects = [s for s in subjects_of(quick=quick) if not only or any(text in s for text in only)]
    _compile_ahead([(s, tiles) for s in subjects for tiles in candidates(s, quick=quick)], quick=quick)
    print(f"compiled after {time.monotonic() - began:.0f} s", flush=True)
    for subject in subjects:
        if time.monotonic() - began > budget:
            print(f"{subject}: not run, the budget was spent", flush=True)
            continue
        try:
            results.append(_tried(subject, watch=watch, quick=quick))
        except Exception as error:  # noqa: BLE001  the other subjects must run
            print(f"{subject}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tune.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        torch.cuda.empty_cache()
    print(f"done after {time.monotonic() - began:.0f} s", flush=True)
    return 0 if results else 1


def _tried(subject: str, *, watch: Stopwatch, quick: bool) -> dict[str, object]:
    launch, default = launcher(subject, quick=quick), default_of(subject, quick=quick)
    expected, timed, failed = launch(default), [], []
    for tiles in candidates(subject, quick=quick):
        try:
            apart = difference(launch(tiles), expected=expected)
            if not apart < 3e-2:
                raise ValueError(f"differs from the default's result by {apart:.1e}")
            timed.append((watch.time(functools.partial(launch, tiles)).ms, tiles))
        except Exception as error:  # noqa: BLE001  what cannot run is a result here
            failed.append(f"{tiles}: {type(error).__name__}: {str(error)[:100]}")
    timed.sort(key=lambda pair: pair[0])
    now = next((ms for ms, tiles in timed if tiles == default), float("nan"))
    best = "; ".join(f"{ms:.4f} ms {_short(tiles)}" for ms, tiles in timed[:4])
    print(f"{subject}: now {now:.4f} ms {_short(default)}; best: {best}; failed: {len(failed)}", flush=True)
    return {
        "subject": subject, "default": dataclasses.asdict(default), "default_ms": now, "failed": failed,
        "timed": [{"ms": ms, **dataclasses.asdict(tiles)} for ms, tiles in timed],
    }


def _short(tiles: Tiles) -> str:
    return "x".join(str(int(x)) for x in dataclasses.astuple(tiles))


def shapes_of(*, quick: bool) -> tuple[Groups, ...]:
    """Grouped shapes that are tuned."""
    return QUICK if quick else FLAGSHIP


def subjects_of(*, quick: bool) -> Iterator[str]:
    """Names of what is tuned: part, then shape."""
    for index, part in itertools.product(range(len(QUICK)) if quick else TUNED, ("forward", "dX", "dW")):
        yield f"grouped_gemm {part} {index} {shapes_of(quick=quick)[index].name}"
    for index, part in itertools.product((0,) if quick else (0, 1), ("forward", "keys", "queries")):
        yield f"attention {part} {index} {'flagship' if index == 0 and not quick else 'small'}"


def default_of(subject: str, *, quick: bool) -> Tiles:
    """What the launch chooses today."""
    op, part, index = subject.split()[:3]
    capability = capability_of(torch.device("cuda"))
    if op == "attention":
        width = _heads(int(index), quick=quick).width
        return choose_blocks(capability=capability, width=width, element_bytes=2, part=part)
    shape = shapes_of(quick=quick)[int(index)]
    choose = outer_tiles if part == "dW" else choose_tiles
    return choose(rows=shape.rows, groups=shape.groups, capability=capability, element_bytes=2)


def candidates(subject: str, *, quick: bool) -> list[Tiles]:
    """The default first, then others of its kind; what a chip cannot hold fails when it is tried."""
    op, part, index = subject.split()[:3]
    default = default_of(subject, quick=quick)
    if op == "attention":
        made = [AttentionBlocks(*c) for c in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))]
    elif part == "dW":
        sizes = ((128, 128), (128, 256), (256, 128), (64, 256))
        made = [GemmTiles(*size, inner, warps, stages, uses_tma=True) for size in sizes for inner in (64, 128)
                for warps in (4, 8) for stages in (3, 4) if warps == 8 or size[0] * size[1] < 1 << 15]
    else:
        shape = shapes_of(quick=quick)[int(index)]
        large = shape.rows // shape.groups > 256
        sizes = ((128, 128), (128, 256), (256, 128)) if large else ((default.rows, 64), (default.rows, 128),
                                                                     (default.rows, 256), (2 * default.rows, 128))
        made = [GemmTiles(*size, inner, warps, stages, uses_tma=True) for size in sizes for inner in (64, 128)
                for warps in (4, 8) for stages in (3, 4, 5) if warps == 8 or size[0] * size[1] < 1 << 15]
    fitting = [tiles for tiles in made if _shared_bytes(tiles) <= SHARED_BYTES]
    doubled = [
        dataclasses.replace(tiles, programs=2) for tiles in (default, *fitting)
        if isinstance(tiles, GemmTiles) and 2 * _shared_bytes(tiles) <= SHARED_BYTES
    ]
    return list(dict.fromkeys([default, *fitting, *doubled]))


def _shared_bytes(tiles: Tiles) -> int:
    """What a pipeline of bf16 blocks needs at least (attention's for heads of 128)."""
    if isinstance(tiles, AttentionBlocks):
        return 2 * 128 * (tiles.queries + 2 * tiles.keys * (tiles.stages - 1))
    return 2 * tiles.inner * (tiles.rows + tiles.cols) * tiles.stages


def _heads(index: int, *, quick: bool) -> Heads:
    return SMALL if quick or index else FLAGSHIP_HEADS


def launcher(subject: str, *, quick: bool, small: bool = False) -> Callable[[Tiles], object]:
    """A function that runs the subject with given tiles on tensors made once. small: sizes that compile to the same
    kernel (as many groups, widths that 16 and every tile divide) and need no memory."""
    op, part, index = subject.split()[:3]
    if op == "attention":
        return _attention(_heads(int(index), quick=quick), part=part)
    shape = shapes_of(quick=quick)[int(index)]
    if small:
        shape = dataclasses.replace(shape, rows=2 * shape.groups, inner=256, cols=256)
    ends = ends_of(shape.counts())
    if part == "dW":
        left, right = normal(shape.rows, shape.cols), normal(shape.rows, shape.inner, seed=1)
        return lambda tiles: multiply_outer(left, right=right, offsets=ends, tiles=tiles)
    weight = normal(shape.groups, shape.cols, shape.inner, scale=shape.inner**-0.5, seed=2)
    x = normal(shape.rows, shape.cols if part == "dX" else shape.inner)
    return lambda tiles: multiply_rows(x, weight=weight, offsets=ends, transposed=part == "dX", tiles=tiles)


def _attention(heads: Heads, *, part: str) -> Callable[[Tiles], object]:
    """Forward, or the whole backward pass with other blocks in `part` alone."""
    intervals = intervals_of(heads, mask=MASKS[0])
    shape, scale = (heads.batch, heads.tokens), heads.width**-0.5
    query, key, value, grad = (
        normal(*shape, count, heads.width, seed=seed)
        for seed, count in enumerate((heads.heads, heads.groups, heads.groups, heads.heads))
    )
    out, lse = operator.attention_op(query, key, value, intervals, 0, scale)
    chosen = operator.choose_blocks

    def run(tiles: Tiles) -> object:
        operator.choose_blocks = functools.partial(_chosen, part, tiles, chosen)
        try:
            if part == "forward":
                return operator.attention_op(query, key, value, intervals, 0, scale)[0]
            return operator.attention_backward(query, key, value, intervals, out, lse, grad, 0, scale)
        finally:
            operator.choose_blocks = chosen

    return run


def _chosen(tuned: str, tiles: Tiles, otherwise: Callable[..., Tiles], *, part: str, **sizes: int) -> Tiles:
    return tiles if part == tuned else otherwise(part=part, **sizes)


def _compile_ahead(pairs: list[tuple[str, Tiles]], *, quick: bool) -> None:
    """Run every pair once in other processes; what fails there is told by the trial itself."""
    workers = max(1, min(COMPILERS, (os.cpu_count() or 2) - 2))
    shares = [pairs[n::workers] for n in range(workers)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(functools.partial(_compile_share, quick=quick), shares))


def _compile_share(pairs: list[tuple[str, Tiles]], *, quick: bool) -> None:
    for subject, tiles in pairs:
        with contextlib.suppress(Exception):
            launcher(subject, quick=quick, small=True)(tiles)
            torch.cuda.synchronize()
