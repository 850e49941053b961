"""Attention under row intervals against the dense reference."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.attention import attention, dense_mask, plan_attention
from ernie5_kernels.testing import ODD_SIZES, assert_close, outputs_and_gradients, poisoned_memory


def causal_documents(lengths: list[int], *, padding: int = 0) -> torch.Tensor:
    """Intervals [1, T, 4] of packed causal documents, then padding columns that see themselves."""
    columns = []
    for length in lengths:
        start, end = len(columns), len(columns) + length
        columns += [(j, 0, 0, end) for j in range(start, end)]
    columns += [(j, 0, 0, j + 1) for j in range(len(columns), len(columns) + padding)]
    return torch.tensor(columns, dtype=torch.int32).unsqueeze(0)


def random_intervals(tokens: int, *, rows: int, seed: int) -> torch.Tensor:
    """Arbitrary intervals, rows that see nothing included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tokens + 1, (rows, tokens, 4), generator=generator, dtype=torch.int32).sort(-1).values[
        ..., [0, 1, 2, 3]
    ]


def tensors(rows: int, *, queries: int, keys: int, heads: int = 4, groups: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    shapes = ((rows, queries, heads, 6), (rows, keys, groups, 6), (rows, keys, groups, 6))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def both(intervals: torch.Tensor | None, *, inputs: tuple[torch.Tensor, ...], chunk_rows: int = 16) -> None:
    plan = plan_attention(
        intervals, batch_rows=inputs[0].shape[0], query_tokens=inputs[0].shape[1], key_tokens=inputs[1].shape[1],
        chunk_rows=chunk_rows,
    )
    results = [
        outputs_and_gradients(lambda q, k, v, b=b: attention(q, key=k, value=v, plan=plan, backend=b), inputs=inputs)
        for b in ("torch", "reference")
    ]
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected=expected, tolerance=1e-12, reason="fp64, another order of sums")


@pytest.mark.parametrize("tokens", ODD_SIZES)
def test_one_causal_document_matches_the_reference_with_gradients(tokens: int) -> None:
    both(causal_documents([tokens]), inputs=tensors(1, queries=tokens, keys=tokens))


@pytest.mark.parametrize("lengths", [[1] * 40, [63, 2, 100], [130], [5, 64, 64]])
def test_packed_documents_with_padding_match_the_reference_with_gradients(lengths: list[int]) -> None:
    intervals = causal_documents(lengths, padding=7)
    both(intervals, inputs=tensors(1, queries=intervals.shape[1], keys=intervals.shape[1]))


def test_arbitrary_intervals_and_rows_that_see_nothing_match_the_reference() -> None:
    both(random_intervals(77, rows=3, seed=1), inputs=tensors(3, queries=77, keys=77))


def test_queries_after_a_cache_match_the_reference_with_and_without_intervals() -> None:
    both(causal_documents([70]), inputs=tensors(1, queries=9, keys=70))
    both(None, inputs=tensors(2, queries=9, keys=70))


def test_a_row_that_sees_no_key_gives_zero_and_no_nan() -> None:
    intervals = torch.zeros(1, 8, 4, dtype=torch.int32)
    query, key, value = tensors(1, queries=8, keys=8)
    plan = plan_attention(intervals, batch_rows=1, query_tokens=8, key_tokens=8)
    for part in outputs_and_gradients(
        lambda q, k, v: attention(q, key=k, value=v, plan=plan), inputs=(query, key, value)
    ):
        assert torch.equal(part, torch.zeros_like(part))


def test_masks_remade_on_use_equal_the_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie5_kernels.attention.plan.KEPT_MASK_BYTES", 0)
    both(random_intervals(65, rows=2, seed=2), inputs=tensors(2, queries=65, keys=65))


def test_uninitialised_memory_is_never_read() -> None:
    with poisoned_memory():
        both(causal_documents([3, 90], padding=5), inputs=tensors(1, queries=98, keys=98))


def test_dense_mask_follows_the_definition_of_intervals() -> None:
    intervals = torch.tensor([[[0, 2, 3, 5], [1, 0, 0, 4]]], dtype=torch.int32)
    seen = dense_mask(intervals, query_start=0, query_tokens=5)[0].T.tolist()
    assert seen == [[True, True, False, True, True], [False, True, True, True, False]]


def test_bf16_stays_near_the_fp32_result() -> None:
    intervals = causal_documents([50, 20])
    inputs = [t.float() for t in tensors(1, queries=70, keys=70)]
    plan = plan_attention(intervals, batch_rows=1, query_tokens=70, key_tokens=70)
    wide = attention(inputs[0], key=inputs[1], value=inputs[2], plan=plan)
    q, k, v = (t.bfloat16() for t in inputs)
    assert_close(attention(q, key=k, value=v, plan=plan), expected=wide, tolerance=3e-2, reason="8 bits of mantissa")


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = tensors(1, queries=8, keys=8)
    plan = plan_attention(None, batch_rows=1, query_tokens=7, key_tokens=8)
    with pytest.raises(ValueError, match="plan for 7 queries"):
        attention(query, key=key, value=value, plan=plan)
