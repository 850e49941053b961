"""PyTorch's own attention behind the seam, `sdpa` and `flex`, against the dense reference on awkward masks."""

from __future__ import annotations

import pytest
import torch

from ernie5.errors import KernelError
from ernie5_kernels.attention import attention, dense_mask, plan_attention
from ernie5_kernels.attention.flex import BLOCK, block_table
from ernie5_kernels.dispatch import choose_backend
from ernie5_kernels.testing import assert_close, outputs_and_gradients, poisoned_memory

Tensors = tuple[torch.Tensor, ...]


def packed(lengths: list[int], *, block: tuple[int, int] | None = None, padding: int = 0) -> torch.Tensor:
    """Intervals [1, T, 4] of causal documents, columns block[0] .. block[1]-1 a picture that sees itself whole, then
    padding that sees itself."""
    columns = []
    for length in lengths:
        start, end = len(columns), len(columns) + length
        columns += [(j, 0, 0, end) for j in range(start, end)]
    if block is not None:
        columns[slice(*block)] = [(block[0], 0, 0, columns[j][3]) for j in range(*block)]
    columns += [(j, 0, 0, j + 1) for j in range(len(columns), len(columns) + padding)]
    return torch.tensor([columns], dtype=torch.int32)


def forgotten_frame() -> torch.Tensor:
    """A clip of three frames of 50 positions in one document; the last frame and what follows do not see the first."""
    intervals = packed([170], block=(100, 150))
    for first in (0, 50):
        intervals[0, first : first + 50, 0] = first
    intervals[0, :50, 1:3] = torch.tensor([100, 170])
    return intervals


def random_intervals(tokens: int, *, rows: int, seed: int) -> torch.Tensor:
    """Sorted random numbers per column; many rows see nothing."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tokens + 1, (rows, tokens, 4), generator=generator, dtype=torch.int32).sort(-1).values


MASKS = {
    "one token": packed([1]),
    "forty documents": packed([1, 3, 2, 5] * 10, padding=3),
    "a picture across a border of blocks": packed([90, 110], block=(110, 180), padding=6),
    "a forgotten frame": forgotten_frame(),
    "rows that see nothing": random_intervals(77, rows=3, seed=1),
    "no row sees anything": torch.zeros(1, 9, 4, dtype=torch.int32),
    "rows of different batch rows": torch.cat([packed([129, 40]), random_intervals(169, rows=1, seed=2)]),
}


def tensors(rows: int, *, queries: int, keys: int, heads: int = 4, groups: int = 2) -> Tensors:
    generator = torch.Generator().manual_seed(queries)
    shapes = ((rows, queries, heads, 6), (rows, keys, groups, 6), (rows, keys, groups, 6))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def run(intervals: torch.Tensor | None, *, inputs: Tensors, backend: str) -> list[torch.Tensor]:
    plan = plan_attention(
        intervals, batch_rows=len(inputs[0]), query_tokens=inputs[0].shape[1], key_tokens=inputs[1].shape[1]
    )
    return outputs_and_gradients(
        lambda q, k, v: attention(q, key=k, value=v, plan=plan, backend=backend), inputs=inputs
    )


def compare(intervals: torch.Tensor | None, *, inputs: Tensors, backend: str) -> None:
    with poisoned_memory():
        actual, expected = (run(intervals, inputs=inputs, backend=name) for name in (backend, "reference"))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, expected=other, tolerance=1e-12, reason="fp64, another order of sums")


@pytest.fixture
def trainable_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses flex's gradients on the CPU for want of a kernel; its plain form has them, and is what runs."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr("ernie5_kernels.attention.flex.refuse_gradients_on_cpu", lambda *tensors: None)


@pytest.mark.parametrize("name", MASKS)
def test_sdpa_matches_the_reference_with_gradients(name: str) -> None:
    intervals = MASKS[name]
    tokens = intervals.shape[1]
    compare(intervals, inputs=tensors(len(intervals), queries=tokens, keys=tokens), backend="sdpa")


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 1)])
def test_sdpa_matches_for_every_sharing_of_key_heads(heads: int, groups: int) -> None:
    compare(packed([9, 4]), inputs=tensors(1, queries=13, keys=13, heads=heads, groups=groups), backend="sdpa")


def test_sdpa_matches_after_a_cache_with_and_without_intervals() -> None:
    compare(packed([70]), inputs=tensors(1, queries=9, keys=70), backend="sdpa")
    compare(None, inputs=tensors(2, queries=9, keys=70), backend="sdpa")


@pytest.mark.usefixtures("trainable_flex")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["a forgotten frame", "rows of different batch rows"])
def test_flex_matches_the_reference_with_gradients(name: str) -> None:
    intervals = MASKS[name]
    tokens = intervals.shape[1]
    compare(intervals, inputs=tensors(len(intervals), queries=tokens, keys=tokens), backend="flex")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("intervals", [packed([70]), None])
def test_flex_matches_after_a_cache_without_gradients(intervals: torch.Tensor | None) -> None:
    query, key, value = tensors(1, queries=9, keys=70)
    plan = plan_attention(intervals, batch_rows=1, query_tokens=9, key_tokens=70)
    flex, reference = (attention(query, key=key, value=value, plan=plan, backend=b) for b in ("flex", "reference"))
    assert_close(flex, expected=reference, tolerance=1e-12, reason="fp64, another order of sums")


def test_flex_refuses_to_train_on_the_cpu_and_names_the_way_out() -> None:
    with pytest.raises(KernelError, match="no backward pass on the CPU.*attention_backend to auto, torch or sdpa"):
        run(packed([5]), inputs=tensors(1, queries=5, keys=5), backend="flex")


@pytest.mark.parametrize("queries", [1, BLOCK, 300])
def test_the_table_of_blocks_is_the_dense_mask_summed_up(queries: int) -> None:
    masks = [packed([90, 310], block=(110, 250), padding=7), random_intervals(407, rows=2, seed=3)]
    far = packed([407])
    far[0, :128, 1:3] = torch.tensor([256, 384])  # one whole pair of blocks hidden, its neighbours not
    for intervals in [*masks, far]:
        start = intervals.shape[1] - queries
        some, whole = block_table(intervals, query_start=start, query_tokens=queries)
        dense = dense_mask(intervals, query_start=start, query_tokens=queries)
        for table, inside, reduce in ((some, False, torch.any), (whole, True, torch.all)):
            rows, keys = -queries % BLOCK, -intervals.shape[1] % BLOCK
            padded = torch.nn.functional.pad(dense, (0, keys, 0, rows), value=inside)
            blocks = padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)
            assert torch.equal(table, reduce(blocks.flatten(3), dim=-1))
    if queries == 300:  # this mask has every kind of block, so the comparison above has seen them
        assert whole.any() and (some & ~whole).any() and not some.all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a forgotten frame", "rows of different batch rows"])
def test_compiled_flex_skips_blocks_and_gives_the_same(name: str) -> None:
    intervals = MASKS[name]
    tokens = intervals.shape[1]
    plan = plan_attention(intervals, batch_rows=len(intervals), query_tokens=tokens, key_tokens=tokens)
    wide = [torch.randn(len(intervals), tokens, heads, 16) for heads in (4, 2, 2)]
    fused = torch.compile(torch.nn.attention.flex_attention.flex_attention)
    heads_first = [x.transpose(1, 2) for x in wide]
    out = fused(*heads_first, block_mask=plan.blocks, scale=0.25, enable_gqa=True).transpose(1, 2)
    expected = attention(wide[0], key=wide[1], value=wide[2], plan=plan, scale=0.25, backend="reference")
    assert_close(out, expected=expected, tolerance=1e-5, reason="fp32, 16 products and up to 170 terms a sum")


def test_auto_never_chooses_pytorch_s_attention_and_other_operators_refuse_it() -> None:
    cpu = torch.device("cpu")
    offered = ("triton", "native", "torch", "sdpa", "flex", "reference")
    assert choose_backend("auto", op="attention", offered=offered, device=cpu) == "torch"
    with pytest.raises(KernelError, match="no sdpa implementation"):
        choose_backend("sdpa", op="swiglu", offered=("triton", "torch", "reference"), device=cpu)
