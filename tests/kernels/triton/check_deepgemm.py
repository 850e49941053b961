"""The back end deepgemm over a stand-in with the interface that DeepGEMM documents: places, products, gradients.

No GPU runs here, so DeepGEMM itself does not. The stand-in follows its README and its tests' layouts, in PyTorch.
"""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest
import torch

from ernie5_kernels.experts import experts
from ernie5_kernels.grouped_gemm import deep, grouped_gemm
from ernie5_kernels.grouped_gemm.deep import align_groups, require_deepgemm
from ernie5_kernels.quant_cast.reference import widen_reference
from ernie5_kernels.testing import assert_close, kernel_device, poisoned_memory, random_tensor
from ernie5_kernels.token_rows import RowPlan

pytestmark = pytest.mark.skipif(kernel_device().type != "cpu", reason="the stand-in is for machines without DeepGEMM")
Scaled = tuple[torch.Tensor, torch.Tensor]


class StandIn:
    """d = a b^T group by group: each block of `alignment` rows takes the group of its first row, none where that is
    -1, and leaves what is in d there."""

    def __init__(self, alignment: int) -> None:
        self.alignment, self.calls = alignment, 0

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return self.alignment

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Scaled, b: Scaled, d: torch.Tensor, m_indices: torch.Tensor) -> None:
        (m, k), (groups, n, inner) = a[0].shape, b[0].shape
        assert a[0].dtype == b[0].dtype == torch.float8_e4m3fn and a[1].dtype == b[1].dtype == torch.float32
        assert k == inner and m % self.alignment == 0 and d.shape == (m, n) and d.dtype == torch.bfloat16
        assert a[1].shape == (m, -(-k // 128)) and b[1].shape == (groups, -(-n // 128), -(-k // 128))
        assert m_indices.shape == (m,) and m_indices.dtype == torch.int32
        assert all(x.is_contiguous() for x in (*a, *b, d, m_indices))
        rows = widen_reference(a[0], scales=a[1], block_rows=1)
        weight = widen_reference(b[0], scales=b[1], block_rows=128)
        for start in range(0, m, self.alignment):
            block = slice(start, start + self.alignment)
            group = int(m_indices[start])
            assert set(m_indices[block].tolist()) <= {group, -1}, "a block has one group"
            if group >= 0:
                d[block] = (rows[block] @ weight[group].T).bfloat16()
        self.calls += 1


@pytest.fixture(params=[128, 8])
def deepgemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in under the package's name, found by the dispatch."""
    package = StandIn(request.param)
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    monkeypatch.setattr("ernie5_kernels.dispatch._require_package", lambda *_, **__: None)
    return package


def by_hand(counts: list[int], *, rows: int, alignment: int, most: int) -> tuple[list[int], list[int], list[int]]:
    """Places of all rows that have one, and of each place its row (or -1) and group (or -1)."""
    places, sources, groups, start = [], [-1] * most, [-1] * most, 0
    for group, count in enumerate(counts):
        for n in range(count):
            sources[start + n], groups[start + n] = len(places), group
            places.append(start + n)
        start += -(-count // alignment) * alignment
    assert start <= most
    return places, sources, groups


@pytest.mark.parametrize("seed", range(12))
def test_places_are_those_counted_by_hand_and_always_fit(seed: int) -> None:
    drawn = random.Random(seed)
    alignment = drawn.choice((1, 4, 8, 128))
    counts = [drawn.choice((0, 0, 1, alignment - 1, alignment, alignment + 1, 3)) for _ in range(drawn.randint(1, 7))]
    rows = sum(counts) + drawn.choice((0, 3))
    dtype = drawn.choice((torch.int32, torch.int64))
    found = align_groups(torch.tensor(counts).cumsum(0).to(dtype), rows=rows, alignment=alignment)
    most = len(found.groups)
    assert most % alignment == 0 and found.groups.dtype == torch.int32
    places, sources, groups = by_hand(counts, rows=rows, alignment=alignment, most=most)
    assert found.groups.tolist() == groups
    assert found.used.tolist() == [n < sum(counts) for n in range(rows)]
    assert found.places[: sum(counts)].tolist() == places and not found.places[sum(counts) :].any()
    assert [row if group >= 0 else -1 for row, group in zip(found.sources.tolist(), groups, strict=True)] == sources
    assert all(0 <= row < max(rows, 1) for row in found.sources.tolist())


def test_the_worst_counts_fill_all_places_but_less_than_a_block() -> None:
    found = align_groups(torch.tensor([1, 2, 3]), rows=3, alignment=8)
    assert len(found.groups) == 24 and (found.groups >= 0).sum() == 3


def test_places_are_found_without_a_word_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a value was read by the host")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    align_groups(torch.tensor([3, 3, 9]), rows=11, alignment=8)
    with pytest.raises(AssertionError, match="read by the host"):
        torch.tensor([3]).tolist()  # a reading would have been seen


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [130, 1, 0, 29]])
def test_products_and_gradients_are_those_of_our_fp8_kernels(counts: list[int], deepgemm: StandIn) -> None:
    rows, offsets = sum(counts) + 2, torch.tensor(counts).cumsum(0)
    x, grad = random_tensor(rows, 144, dtype=torch.bfloat16), random_tensor(rows, 48, seed=2, dtype=torch.bfloat16)
    weight = random_tensor(len(counts), 48, 144, seed=1, dtype=torch.bfloat16)
    x[-2:], grad[-2:] = float("nan"), float("nan")  # rows past the end, which nothing may use
    found = []
    for backend in ("deepgemm", "triton"):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        with poisoned_memory():
            out = grouped_gemm(leaves[0], weight=leaves[1], offsets=offsets, backend=backend, fp8=True)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    assert deepgemm.calls == 2
    for one, other in zip(*found, strict=True):
        assert_close(one, expected=other, tolerance=1e-2, reason="the same e4m3 numbers, results of 8 bits")


def test_gradients_that_nobody_wants_are_not_made(deepgemm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = []
    monkeypatch.setattr(deep, "grouped_outer", lambda *given, real=deep.grouped_outer: (
        outer.append(1), real(*given))[1])
    for frozen, calls in (("weight", (2, 0)), ("rows", (1, 1))):
        deepgemm.calls = 0
        outer.clear()
        rows = random_tensor(6, 128, dtype=torch.bfloat16).requires_grad_(frozen != "rows")
        weight = random_tensor(2, 16, 128, seed=1, dtype=torch.bfloat16).requires_grad_(frozen != "weight")
        out = grouped_gemm(rows, weight=weight, offsets=torch.tensor([4, 6]), backend="deepgemm", fp8=True)
        out.sum().backward()
        assert (deepgemm.calls, len(outer)) == calls, frozen


def test_experts_over_tokens_multiply_by_it(deepgemm: StandIn) -> None:
    places = torch.arange(10).view(5, 2)
    plan, offsets = RowPlan(places.flatten() // 2, places), torch.tensor([4, 4, 10])
    shapes = ((5, 32), (3, 64, 32), (3, 32, 32))
    x, up, down = (random_tensor(*shape, seed=n, dtype=torch.bfloat16) / 4 for n, shape in enumerate(shapes))
    one, other = (
        experts(x, row_weights=torch.ones(10), gate_up=up, down=down, offsets=offsets, plan=plan, backend=b, fp8=True)
        for b in ("deepgemm", "triton")
    )
    assert deepgemm.calls == 2
    assert_close(one, expected=other, tolerance=2e-2, reason="the same e4m3 numbers, results of 8 bits")


def test_no_rows_make_no_call(deepgemm: StandIn) -> None:
    x, weight = random_tensor(0, 32, dtype=torch.bfloat16), random_tensor(2, 16, 32, dtype=torch.bfloat16)
    out = grouped_gemm(x, weight=weight, offsets=torch.zeros(2, dtype=torch.int64), backend="deepgemm", fp8=True)
    assert out.shape == (0, 16) and deepgemm.calls == 0


def test_what_it_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = random_tensor(4, 32, dtype=torch.bfloat16), random_tensor(2, 16, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rows .*deepgemm multiplies for bfloat16 alone; use triton"):
        require_deepgemm(x.float(), weight=weight, op="op")
    with pytest.raises(ValueError, match=r"weight has shape \(2, 24, 32\).*multiples of 16"):
        require_deepgemm(x, weight=random_tensor(2, 24, 32), op="op")
    require_deepgemm(x, weight=weight, op="op")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    newer = SimpleNamespace(
        dtype=x.dtype, device=torch.device("cuda"), shape=x.shape, stride=x.stride, is_contiguous=x.is_contiguous
    )
    with pytest.raises(ValueError, match="compute capability 9.0 .*powers of two"):
        deep.require_deepgemm(newer, weight=weight, op="op")
