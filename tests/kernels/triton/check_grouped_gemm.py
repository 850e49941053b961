"""Grouped products in Triton: empty groups, all rows in one, rows past the end full of NaN, both kinds of loading."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.grouped_gemm import grouped_gemm, kernel
from ernie5_kernels.grouped_gemm.kernel import grouped_gemm_triton, multiply_outer, multiply_rows
from ernie5_kernels.grouped_gemm.reference import grouped_gemm_reference
from ernie5_kernels.grouped_gemm.tiles import GemmTiles, choose_tiles, most_tiles, read_wide, tile_table
from ernie5_kernels.testing import assert_backends_agree, assert_close, kernel_device, poisoned_memory, random_tensor

COUNTS = ([3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [63, 1, 0, 29])
MANY_TILES = [1100, 0, 2100]  # more than 64 of 16 rows in a group, which one step of the table's kernel writes
SMALL, LARGE = GemmTiles(16, 16, 16, warps=4, stages=2), GemmTiles(64, 16, 32, warps=4, stages=2)
BY_TMA = GemmTiles(64, 16, 16, warps=4, stages=2, uses_tma=True)
ORDER = "fp32, another order of sums"


def ends_of(counts: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(counts, dtype=dtype).cumsum(0, dtype=dtype).to(kernel_device())


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("extra", [0, 4])
def test_products_and_gradients_match_the_reference(counts: list[int], extra: int) -> None:
    offsets = ends_of(counts, torch.int32 if extra else torch.int64)
    inputs = (random_tensor(sum(counts) + extra, 7), random_tensor(len(counts), 5, 7, seed=1))
    assert_backends_agree(
        lambda r, w, b: grouped_gemm(r, weight=w, offsets=offsets, backend=b), inputs=inputs, tolerance=1e-5,
        reason=ORDER,
    )


def test_bf16_products_match_the_reference() -> None:
    inputs = tuple(x.bfloat16() for x in (random_tensor(40, 24), random_tensor(3, 8, 24, seed=1)))
    assert_backends_agree(
        lambda r, w, b: grouped_gemm(r, weight=w, offsets=ends_of([20, 0, 18]), backend=b), inputs=inputs,
        tolerance=1e-2, reason="8 bits of mantissa in operands and results, fp32 between",
    )


def test_widths_that_cannot_be_read_wide_take_tiles_that_do_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three products, forward and backward; 260 rows in two groups would take the large tile."""
    asked = []
    for name in ("choose_tiles", "outer_tiles"):
        chooses = getattr(kernel, name)
        monkeypatch.setattr(
            kernel, name, lambda *, reads_wide, chooses=chooses, **shape: (
                asked.append(reads_wide), chooses(reads_wide=reads_wide, **shape))[1]
        )
    for inner, cols, wide in ((39, 21, False), (48, 21, False), (48, 32, True)):
        asked.clear()
        inputs = tuple(x.bfloat16() for x in (random_tensor(260, inner), random_tensor(2, cols, inner, seed=1)))
        assert_backends_agree(
            lambda r, w, b: grouped_gemm(r, weight=w, offsets=ends_of([250, 8]), backend=b), inputs=inputs,
            tolerance=1e-2, reason="8 bits of mantissa in operands and results, fp32 between",
        )
        # forward reads the inner width alone, dX both, dW both
        assert asked == [inner % 16 == 0, wide, wide], (inner, cols)


def test_what_can_be_read_wide() -> None:
    made = torch.zeros(8, 48, dtype=torch.bfloat16, device=kernel_device())
    by_eight = made.new_zeros(8, 24)
    assert read_wide(made, capability=80) and read_wide(made, capability=90)
    assert not read_wide(made, by_eight, capability=80) and read_wide(made, by_eight, capability=90)  # TMA counts bytes
    askew = made.flatten()[1:49].view(1, 48)
    assert not read_wide(askew, capability=80) and not read_wide(askew, capability=100)
    one_row = made.flatten()[:51].view(1, 51)[:, :48]  # counts as contiguous, but TMA is told of its stride
    assert one_row.is_contiguous() and not read_wide(one_row, capability=90)
    for capability in (80, 90, 100):
        for chooses in (choose_tiles, kernel.outer_tiles):
            tiles = chooses(rows=9999, groups=1, capability=capability, element_bytes=2, reads_wide=False)
            assert not tiles.uses_tma and tiles.rows * tiles.cols <= 128 * 128 and tiles.warps == 8


@pytest.mark.parametrize("tiles", [SMALL, LARGE, BY_TMA])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_way_of_tiling_matches_and_never_uses_rows_past_the_end(tiles: GemmTiles, transposed: bool) -> None:
    offsets, x = ends_of([0, 70, 1, 0, 20]), random_tensor(94, 40)
    weight = random_tensor(5, 40, 24, seed=1) if transposed else random_tensor(5, 24, 40, seed=1)
    expected = grouped_gemm_reference(
        x, weight=weight.transpose(1, 2) if transposed else weight, offsets=offsets
    )
    x[91:] = float("nan")
    with poisoned_memory():
        out = multiply_rows(x, weight=weight, offsets=offsets, transposed=transposed, tiles=tiles)
    assert_close(out, expected=expected, tolerance=1e-5, reason=ORDER)


def test_one_row_of_a_wider_tensor_is_multiplied_where_tma_cannot_read_it() -> None:
    x, weight, offsets = random_tensor(1, 43)[:, :40], random_tensor(1, 24, 40, seed=1), ends_of([1])
    assert x.is_contiguous()
    out = multiply_rows(x, weight=weight, offsets=offsets, transposed=False, tiles=BY_TMA)
    assert_close(out, expected=x @ weight[0].T, tolerance=1e-5, reason=ORDER)
    left = random_tensor(1, 24, seed=2)
    outer = multiply_outer(left, right=x, offsets=offsets, tiles=BY_TMA)
    assert_close(outer[0], expected=left.T @ x, tolerance=1e-5, reason=ORDER)


@pytest.mark.parametrize("tiles", [SMALL, BY_TMA])
def test_weight_gradients_are_zero_without_rows_and_never_use_rows_past_the_end(tiles: GemmTiles) -> None:
    counts, left, right = [0, 70, 1, 0, 20], random_tensor(94, 24), random_tensor(94, 40, seed=1)
    left[91:], right[91:] = float("nan"), float("inf")
    with poisoned_memory():
        out = multiply_outer(left, right=right, offsets=ends_of(counts), tiles=tiles)
    starts = [0, 0, 70, 71, 71]
    expected = [left[a : a + n].T @ right[a : a + n] for a, n in zip(starts, counts, strict=True)]
    assert_close(out, expected=torch.stack(expected), tolerance=1e-5, reason=ORDER)
    assert torch.equal(out[0], torch.zeros_like(out[0]))


def test_gathered_rows_of_a_weight_gradient_equal_a_copy() -> None:
    x, left, offsets = random_tensor(9, 24), random_tensor(18, 8, seed=2), ends_of([6, 0, 12])
    sources = torch.arange(18, device=kernel_device()) * 5 % 9
    assert_close(multiply_outer(left, right=x, offsets=offsets, sources=sources),
                 expected=multiply_outer(left, right=x[sources], offsets=offsets), tolerance=0.0,
                 reason="the same sums")


@pytest.mark.parametrize("counts", [*COUNTS, [16, 32, 1], MANY_TILES])
def test_the_table_covers_every_row_once_within_the_bound(counts: list[int]) -> None:
    rows = sum(counts) + 5
    with poisoned_memory():
        table, count = tile_table(ends_of(counts), rows=rows, block_rows=16)
    used = table[: int(count)].tolist()
    assert int(count) <= most_tiles(rows=rows, groups=len(counts), block_rows=16) == table.shape[0]
    covered = [row for _, first, end in used for row in range(first, min(end, first + 16))]
    owner = [group for group, n in enumerate([*counts, 5]) for _ in range(n)]
    assert covered == list(range(rows)) and all(owner[first] == group for group, first, _ in used)


def test_a_group_beyond_31_bits_of_offset_is_addressed() -> None:
    """Group 513 starts at element 513 * 2^22 > 2^31; the memory before it is reserved and never touched."""
    weight = torch.empty(514, 2048, 2048, dtype=torch.float16, device=kernel_device())
    weight[-1] = random_tensor(2048, 2048, dtype=torch.float16)
    x = random_tensor(1, 2048, dtype=torch.float16, seed=1)
    out = multiply_rows(x, weight=weight, offsets=ends_of([0] * 513 + [1]), transposed=False)
    assert_close(out.float(), expected=x.float() @ weight[-1].float().T, tolerance=1e-3, reason="fp16 result")


def test_wrong_tensors_are_refused_by_name() -> None:
    rows, weight, offsets = random_tensor(4, 8), random_tensor(2, 8, 8), ends_of([2, 2])
    with pytest.raises(ValueError, match=r"grouped_gemm: weight has shape \(2, 8, 8\).*contiguous"):
        grouped_gemm(rows, weight=weight.transpose(1, 2), offsets=offsets, backend="triton")
    with pytest.raises(ValueError, match="grouped_gemm: weight .* dtype torch.float32 like the first"):
        grouped_gemm(rows, weight=weight.half(), offsets=offsets, backend="triton")
    with pytest.raises(ValueError, match="grouped_gemm: offsets .* int32 or int64"):
        grouped_gemm(rows, weight=weight, offsets=offsets.float(), backend="triton")


def test_the_operator_passes_opcheck() -> None:
    inputs = (random_tensor(5, 8).requires_grad_(), random_tensor(2, 4, 8).requires_grad_(), ends_of([2, 3]), False)
    torch.library.opcheck(grouped_gemm_triton, inputs)
