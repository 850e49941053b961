"""Kernels in the configurations that their launches choose, with the work of one flagship step on one device.

Flagship (configs): width 8,192, expert width 3,584, 384 experts of which 8 are chosen, 64 query and 8 key heads of 128,
vocabulary 200,000; a device holds 8,192 tokens in rows of 8,192 and, with 64-fold expert parallelism, 6 experts that
receive 65,536 rows when loads are even.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from compiler import Source

from ernie5_kernels.grouped_gemm.tiles import GemmTiles

TOKENS, WIDTH, EXPERT_WIDTH, TOP_K = 8192, 8192, 3584, 8
EXPERTS, LOCAL_EXPERTS = 384, 6
ROWS = TOKENS * TOP_K
QUERY_HEADS, KEY_HEADS, HEAD_WIDTH, VOCABULARY = 64, 8, 128, 200_000
BITS_CELLS, BITS = 8192, 48


@dataclasses.dataclass(frozen=True)
class Work:
    """What one launch at the flagship's shape does. moved: bytes of device memory by the tiling's own count (what a
    program reads again is counted again unless neighbours share it in L2); least: each input and output once."""

    operations: float
    moved: float
    least: float
    tiles: float
    arithmetic: str


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration: `source_for(capability)` gives what to compile, `work_for(capability)` what it does,
    `programs_for(capability)` how many of its programs the launch wants on a processor at once."""

    op: str
    variant: str
    source_for: Callable[[int], Source]
    work_for: Callable[[int], Work]
    capabilities: tuple[int, ...] = (80, 90, 100)
    uses_tensor_core: bool = False
    quick: bool = False
    programs_for: Callable[[int], int] = lambda capability: 1


def streaming(*, moved: float, tiles: float, least: float | None = None, operations: float = 0.0) -> Work:
    """Element-wise work, bound by memory."""
    return Work(operations or moved, moved, moved if least is None else least, tiles, "fp32")


def product(
    *, rows: int, cols: int, inner: int, groups: int, tiles: GemmTiles, shared: int, element_bytes: int
) -> Work:
    """A grouped product: rows are read once, a weight once for every `shared` row tiles of its group, results once.

    The column tiles of `shared` neighbouring row tiles run together, so their rows stay in L2 (at most 128 MB there
    for 8 tiles of 128 rows of 8,192 wide bf16: 17 MB).
    """
    row_tiles = groups * -(-rows // groups // tiles.rows)
    passes = max(1, -(-(row_tiles // groups) // shared))
    weight, ends = groups * cols * inner * element_bytes, rows * inner * element_bytes + rows * cols * 2
    count = row_tiles * -(-cols // tiles.cols)
    arithmetic = "fp8" if element_bytes == 1 else "bf16"
    return Work(2.0 * rows * cols * inner, ends + passes * weight, ends + weight, count, arithmetic)
