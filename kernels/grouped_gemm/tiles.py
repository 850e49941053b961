"""Tile sizes, and the table on the device that says which group and rows a tile of the launch works on.

Nothing here reads the device: the launch is as large as the largest number of tiles that R rows in E groups can make,
and programs stop at the number that the table's kernel counted. That keeps a step free of synchronisation, so a CUDA
graph may hold it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ..launch import ceil_div, power_of_two

TABLE_COLUMNS = 3
TMA_BYTES, TMA_FROM = 16, 90
TOLD_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class GemmTiles:
    """rows x cols of the output per tile, `inner` of the contraction per step; how a chip runs it.

    uses_tma: operands arrive by TMA descriptors; specializes: warps split into loading and multiplying ones; programs:
    how many of them a processor runs side by side.
    """

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    uses_tma: bool = False
    specializes: bool = False
    programs: int = 1


def choose_tiles(
    *, rows: int, groups: int, capability: int, element_bytes: int, reads_wide: bool = True
) -> GemmTiles:
    """Tiles by the mean rows of a group in powers of two, never by the rows of one step (PARALLEL section 5).

    Below 64 rows the kernel multiplies the transposed way, so that the tensor core's 64 rows are weight columns. From
    sm_90 on, a mean of more than 128 rows takes the large tile, for all that its last tile is half empty, and small
    tiles run as many programs side by side as a processor holds (README, measured on a GPU). reads_wide: what
    `read_wide` says; else an address per element fills the registers of large tiles, which would spill.
    """
    mean = power_of_two(max(1, rows // max(1, groups)))
    block = 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= (256 if capability < 90 else 128) else 128
    inner = 32 if element_bytes == 4 else 64
    if element_bytes == 4 or capability < 80:
        return GemmTiles(min(block, 64), 64, inner, warps=4, stages=2)
    if not reads_wide:
        return GemmTiles(min(block, 64) if capability < 90 else block, 128, 32, warps=8, stages=2)
    if capability < 90:
        return GemmTiles(block, 128, inner if block < 128 else 32, warps=8 if block == 128 else 4, stages=3)
    if block == 128:  # with 256 columns specialised warps spill on sm_100 (aot_report)
        return GemmTiles(128, 256, inner, warps=8, stages=3, uses_tma=True)
    specializes = capability >= 100 and block == 64  # 12 warps of 168 registers fill a processor
    return GemmTiles(block, 128, inner, 4, 3, uses_tma=True, specializes=specializes, programs=1 if specializes else 3)


def fits_tma(*tensors: torch.Tensor) -> bool:
    """Whether TMA can read the tensors: aligned to 16 bytes, strides too, which a single row's width does not tell."""
    return all(
        t.data_ptr() % TMA_BYTES == 0 and t.numel()
        and all(stride * t.element_size() % TMA_BYTES == 0 for stride in t.stride()[:-1])
        for t in tensors
    )


def read_wide(*tensors: torch.Tensor, capability: int) -> bool:
    """Whether 16 bytes can be read at once: by TMA from sm_90 on, before by what the compiler is told of addresses and
    widths, which is whether 16 divides them."""
    if capability >= TMA_FROM:
        return fits_tma(*tensors)
    return all(t.data_ptr() % TMA_BYTES == 0 and t.shape[-1] % TOLD_MULTIPLE == 0 for t in tensors)


def most_tiles(*, rows: int, groups: int, block_rows: int) -> int:
    """An upper bound of sum over groups, and over the rows past the last one, of ceil(rows / block_rows)."""
    return rows // block_rows + groups + 1


@triton.jit
def tile_table_kernel(
    offsets, table, count, groups, rows, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, STEP: tl.constexpr
):
    """Program g writes (g, first row, end of the group) of its tiles; program `groups` those of rows past the end."""
    group = tl.program_id(0)
    index = tl.arange(0, BLOCK_GROUPS)
    ends = tl.load(offsets + index, mask=index < groups, other=0).to(tl.int32)
    starts = tl.load(offsets + index - 1, mask=(index > 0) & (index < groups), other=0).to(tl.int32)
    tiles = tl.where(index < groups, (ends - starts + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)
    before = tl.sum(tl.where(index < group, tiles, 0))
    start = tl.load(offsets + group - 1, mask=group > 0, other=0).to(tl.int32)
    end = tl.load(offsets + group, mask=group < groups, other=rows).to(tl.int32)
    own = (end - start + BLOCK_ROWS - 1) // BLOCK_ROWS
    for first in range(0, own, STEP):
        tile = first + tl.arange(0, STEP)
        place = table + 3 * (before + tile)
        tl.store(place, tl.zeros((STEP,), tl.int32) + group, mask=tile < own)
        tl.store(place + 1, start + tile * BLOCK_ROWS, mask=tile < own)
        tl.store(place + 2, tl.zeros((STEP,), tl.int32) + end, mask=tile < own)
    tl.store(count, before + own, mask=group == groups)


def tile_table(offsets: torch.Tensor, *, rows: int, block_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(table [most_tiles, 3] int32 of (group, first row, end row), its length [1] int32), both on the device.

    Group E stands for rows past the last offset.
    """
    groups = offsets.shape[0]
    limit = most_tiles(rows=rows, groups=groups, block_rows=block_rows)
    table = torch.empty((limit, TABLE_COLUMNS), dtype=torch.int32, device=offsets.device)
    count = torch.empty(1, dtype=torch.int32, device=offsets.device)
    tile_table_kernel[(groups + 1,)](
        offsets, table, count, groups, rows, block_rows, power_of_two(groups), 64, num_warps=1 if groups < 128 else 4
    )
    return table, count


def most_programs(*, tiles: int, processors: int) -> int:
    """Programs of a persistent launch over at most `tiles` tiles."""
    return max(1, min(tiles, processors))


def column_tiles(columns: int, *, tiles: GemmTiles) -> int:
    """Tiles side by side over `columns`."""
    return ceil_div(columns, tiles.cols)
