"""Attention in Triton against the dense reference: documents, visual blocks, caches, rows that see nothing."""

from __future__ import annotations

import math

import pytest
import torch

from ernie5_kernels.attention import attention, dense_mask, operator, plan_attention
from ernie5_kernels.attention.blocks import BlockLists, block_lists, summarise_keys
from ernie5_kernels.attention.kernel import AttentionBlocks
from ernie5_kernels.testing import assert_backends_agree, assert_close, kernel_device, poisoned_memory, random_tensor

FP32 = {"tolerance": 1e-5, "reason": "fp32 sums in another order"}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 by 32, so that fifty tokens have hidden, partial and whole pairs."""
    wide, tall = AttentionBlocks(16, 32, warps=4, stages=1), AttentionBlocks(32, 16, warps=4, stages=1)
    monkeypatch.setattr(operator, "choose_blocks", lambda *, part, **_: tall if part == "queries" else wide)


def packed(documents: list[list[int]], *, padding: int = 0) -> torch.Tensor:
    """Intervals [1, T, 4] of documents, each a list of blocks: +n causal tokens, -n tokens that see each other."""
    columns = []
    for document in documents:
        end = len(columns) + sum(map(abs, document))
        for block in document:
            start = len(columns)
            columns += [(start if block < 0 else start + j, 0, 0, end) for j in range(abs(block))]
    columns += [(j, 0, 0, j + 1) for j in range(len(columns), len(columns) + padding)]
    return torch.tensor(columns, dtype=torch.int32, device=kernel_device()).unsqueeze(0)


def random_intervals(tokens: int, *, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, tokens + 1, (rows, tokens, 4), generator=generator, dtype=torch.int32)
    return drawn.sort(-1).values.to(kernel_device())


def assert_matches_reference(
    intervals: torch.Tensor | None, *, batch: int = 1, queries: int, keys: int, heads: int = 4, groups: int = 2,
    width: int = 6,
) -> None:
    plan = plan_attention(intervals, batch_rows=batch, query_tokens=queries, key_tokens=keys)
    inputs = (random_tensor(batch, queries, heads, width), random_tensor(batch, keys, groups, width, seed=1),
              random_tensor(batch, keys, groups, width, seed=2))
    assert_backends_agree(lambda q, k, v, b: attention(q, key=k, value=v, plan=plan, backend=b), inputs=inputs, **FP32)


@pytest.mark.parametrize("tokens", (1, 35))
def test_one_causal_document(tokens: int) -> None:
    assert_matches_reference(packed([[tokens]]), queries=tokens, keys=tokens)


def test_packed_documents_with_visual_blocks_and_padding() -> None:
    intervals = packed([[1], [10, -14, 3], [5], [20]], padding=3)
    assert_matches_reference(intervals, queries=intervals.shape[1], keys=intervals.shape[1])


def test_arbitrary_intervals_and_one_head_for_each_key_head() -> None:
    assert_matches_reference(random_intervals(50, rows=1, seed=1), queries=50, keys=50, heads=2, groups=2, width=16)


def test_queries_after_a_cache_with_and_without_intervals() -> None:
    assert_matches_reference(packed([[40]]), queries=9, keys=40)
    assert_matches_reference(None, batch=2, queries=3, keys=20, heads=2, groups=1)


def test_rows_that_see_nothing_give_zero_and_no_nan() -> None:
    plan = plan_attention(torch.zeros(1, 40, 4, dtype=torch.int32, device=kernel_device()), batch_rows=1,
                          query_tokens=40, key_tokens=40)
    leaves = tuple(random_tensor(1, 40, 2, 8, seed=n).requires_grad_() for n in range(3))
    with poisoned_memory():
        out = attention(leaves[0], key=leaves[1], value=leaves[2], plan=plan, backend="triton")
        grads = torch.autograd.grad(out.sum(), leaves)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (out, *grads))


@pytest.mark.parametrize("intervals", [packed([[20, -24, 3], [40]]), random_intervals(87, rows=1, seed=3)])
def test_lists_hold_every_visible_block_once_and_call_whole_only_what_is(intervals: torch.Tensor) -> None:
    mask = torch.nn.functional.pad(dense_mask(intervals, query_start=0, query_tokens=87)[0], (0, 9, 0, 9)).cpu()
    tiles = mask.view(6, 16, 3, 32).transpose(1, 2)
    real = torch.nn.functional.pad(torch.ones(87, 87, dtype=torch.bool), (0, 9, 0, 9)).view(6, 16, 3, 32)
    real = real.transpose(1, 2)
    with poisoned_memory():
        summary = summarise_keys(intervals, block_keys=32)
        sizes = {"queries": 87, "query_start": 0, "block_queries": 16}
        lists = [block_lists(summary, **sizes, by_query=by_query) for by_query in (True, False)]
    for side, made in enumerate(lists):
        for own in range(made.others.shape[1]):
            partial, every = made.counts[0, own].tolist()
            listed = made.others[0, own, :every].tolist()
            assert len(set(listed)) == every
            for other in range(made.others.shape[2]):
                at = (own, other) if side == 0 else (other, own)
                assert other in listed or not tiles[at].any()
                if other in listed[partial:]:
                    assert tiles[at][real[at].any(1)].all()
    summary = summarise_keys(packed([[96]]), block_keys=32)
    causal = block_lists(summary, queries=96, query_start=0, block_queries=16, by_query=True)
    assert causal.counts[0].tolist() == [[1, 1], [1, 1], [1, 2], [1, 2], [1, 3], [1, 3]]


def test_many_rows_with_many_heads_stay_within_the_second_and_third_size_of_a_grid(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA allows 65,535 there; rows times heads would pass it."""
    grids = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *_, **__: grids.append(grid)

    for name in ("attention_forward_kernel", "delta_kernel", "key_gradient_kernel", "query_gradient_kernel"):
        monkeypatch.setattr(operator, name, Recorded())
    empty = torch.zeros(0, dtype=torch.int32)
    lists = BlockLists(empty.view(0, 1, 1), empty)
    monkeypatch.setattr(operator, "block_lists", lambda *_, **__: lists)
    monkeypatch.setattr(operator, "summarise_keys", lambda *_, **__: empty)
    q, k, v = (torch.zeros(5000, 1, 16, 2, device=kernel_device()).requires_grad_() for _ in range(3))
    plan = plan_attention(None, batch_rows=5000, query_tokens=1, key_tokens=1)
    attention(q, key=k, value=v, plan=plan, backend="triton").sum().backward()
    assert len(grids) == 4 and all(max(grid[1:], default=1) <= 65_535 for grid in grids)
    assert [math.prod(grid) for grid in grids if len(grid) > 1] == [80_000] * 3


def test_bf16_slices_of_a_fused_projection_stay_near_the_reference() -> None:
    fused = random_tensor(1, 40, 8, 16, dtype=torch.bfloat16)
    plan = plan_attention(packed([[25, -10], [5]]), batch_rows=1, query_tokens=40, key_tokens=40)

    def attend(x: torch.Tensor, backend: str) -> torch.Tensor:
        return attention(x[:, :, :4], key=x[:, :, 4:6], value=x[:, :, 6:], plan=plan, backend=backend)

    assert_backends_agree(attend, inputs=(fused,), tolerance=2e-2, reason="weights and changes rounded to bf16")


def test_scores_of_thousands_do_not_overflow() -> None:
    plan = plan_attention(packed([[40]]), batch_rows=1, query_tokens=40, key_tokens=40)
    q, k, v = (random_tensor(1, 40, 2, 8, seed=n) for n in range(3))
    out = [attention(1e4 * q, key=k, value=v, plan=plan, backend=b) for b in ("triton", "reference")]
    assert_close(out[0], expected=out[1], tolerance=1e-3, reason="scores of 1e4 in fp32 keep three decimals")


@pytest.mark.parametrize("scale", (-30.0, 0.0))
def test_a_scale_that_is_not_positive_turns_scores_round_or_ignores_them(scale: float) -> None:
    plan = plan_attention(packed([[9, -8], [5]]), batch_rows=1, query_tokens=22, key_tokens=22)
    inputs = tuple(random_tensor(1, 22, 2, 8, seed=n) for n in range(3))
    assert_backends_agree(
        lambda q, k, v, b: attention(q, key=k, value=v, plan=plan, scale=scale, backend=b),
        inputs=inputs, tolerance=1e-3, reason="scores of hundreds in fp32 keep four decimals",
    )


def test_wrong_tensors_are_refused_and_the_operator_passes_opcheck() -> None:
    q, k, v = (random_tensor(1, 8, 2, 8, seed=n) for n in range(3))
    plan = plan_attention(packed([[8]]), batch_rows=1, query_tokens=8, key_tokens=8)
    with pytest.raises(ValueError, match="attention: key .* dtype torch.float32 like the first"):
        attention(q, key=k.bfloat16(), value=v.bfloat16(), plan=plan, backend="triton")
    with pytest.raises(ValueError, match=r"attention: plan.intervals has shape \(1, 8, 4\).*\[2, 8, 4\]"):
        attention(q.repeat(2, 1, 1, 1), key=k.repeat(2, 1, 1, 1), value=v.repeat(2, 1, 1, 1), plan=plan,
                  backend="triton")
    leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
    torch.library.opcheck(operator.attention_op, (*leaves, packed([[8]]), 0, 0.3))
