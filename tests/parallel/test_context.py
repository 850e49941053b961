"""Context parallelism against attention in one process, and the cut of a batch against the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from ernie5.data.document import Shapes
from ernie5.data.synthetic import synthetic_batch
from ernie5.errors import KernelError, LayoutError
from ernie5.parallel.context import ShiftAhead, cut_batch
from ernie5.parallel.dims import GridDims
from ernie5.parallel.ring import RingAttention, RingPlanner
from ernie5.parallel.state import build_state
from ernie5.parallel.token_split import Splitter, TokenSplit
from ernie5.parallel.ulysses import UlyssesAttention, UlyssesPlanner
from ernie5.records import Batch
from ernie5.tokenizers.vocab import Vocab
from ernie5_kernels.attention import attention, plan_attention

VOCAB = Vocab(text_size=300, audio_levels=2, audio_codes=16)
WHOLE = 1000  # positions of a chunk at least: a row is cut once
SHAPES = Shapes(patch_pixels=2, feature_channels=6, bits=4, num_scales=4, audio_levels=2, audio_codes=16)


def documents_with_blocks(tokens: int, *, rows: int) -> torch.Tensor:
    """Intervals [B, T, 4]: causal documents, each with a bidirectional block and a span hidden from later rows."""
    generator = torch.Generator().manual_seed(tokens)
    result = torch.zeros(rows, tokens, 4, dtype=torch.int32)
    for row in range(rows):
        start = 0
        while start < tokens:
            end = min(tokens, start + int(torch.randint(1, max(2, tokens // 2 + 1), (), generator=generator)))
            columns = torch.arange(start, end, dtype=torch.int32)
            result[row, start:end, 0], result[row, start:end, 3] = columns, end
            first, last = start + (end - start) // 4, start + (end - start) // 2
            result[row, first:last, 0] = first
            result[row, first:last, 1], result[row, first:last, 2] = last, last + (end - last) // 2
            start = end
    return result


def pad(x: torch.Tensor, split: TokenSplit) -> torch.Tensor:
    return torch.cat((x, x.new_zeros(x.shape[0], split.all_tokens - x.shape[1], *x.shape[2:])), dim=1)


def alone(intervals: torch.Tensor, all_tokens: int) -> torch.Tensor:
    column = torch.arange(intervals.shape[1], all_tokens, dtype=torch.int32)
    own = torch.stack((column, column * 0, column * 0, column + 1), -1).expand(intervals.shape[0], -1, -1)
    return torch.cat((intervals, own), 1)


def attend_in_parts(
    mode: str, intervals: torch.Tensor, inputs: tuple[torch.Tensor, ...], upstream: torch.Tensor, sinks: bool,
    least: int,
) -> tuple[torch.Tensor, ...]:
    """One rank: output and gradients of its positions."""
    axis, rank, ranks = build_state(GridDims(cp=dist.get_world_size())).cp, dist.get_rank(), dist.get_world_size()
    splitter = Splitter(ranks, least)
    split = splitter.of_row(intervals.shape[1], has_sinks=sinks)
    order = split.order(rank)
    local = [pad(x, split).index_select(1, order).requires_grad_() for x in inputs]
    ring = mode == "ring"
    planner = RingPlanner(axis, splitter=splitter) if ring else UlyssesPlanner(splitter)
    op = RingAttention(axis) if ring else UlyssesAttention(axis, backend="torch")
    plan = planner(
        alone(intervals, split.all_tokens), batch_rows=intervals.shape[0], query_tokens=split.local_tokens,
        key_tokens=split.local_tokens,
    )
    out = op(local[0], key=local[1], value=local[2], plan=plan)
    out.backward(pad(upstream, split).index_select(1, order))
    return (out.detach(), *(x.grad for x in local))


def differentiate_twice() -> None:
    """A ring's backward takes keys that travelled for constants: it refuses, on every rank, before anything is sent."""
    axis, splitter = build_state(GridDims(cp=2)).cp, Splitter(2, WHOLE)
    split = splitter.of_row(8, has_sinks=False)
    plan = RingPlanner(axis, splitter=splitter)(
        alone(documents_with_blocks(8, rows=1), split.all_tokens), batch_rows=1, query_tokens=4, key_tokens=4
    )
    local = [torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = RingAttention(axis)(local[0], key=local[1], value=local[2], plan=plan)
    with pytest.raises(KernelError, match="has no second derivative. Set parallel.context: ulysses"):
        torch.autograd.grad(out.square().sum(), local, create_graph=True)


def test_the_ring_refuses_a_second_derivative(run_ranks: Callable) -> None:
    run_ranks(differentiate_twice, 2)


def check(run_ranks: Callable, *, mode: str, ranks: int, tokens: int, heads: tuple[int, int], sinks: bool = False,
          dtype: torch.dtype = torch.float64, tolerance: float = 1e-12, least: int = WHOLE) -> None:
    generator = torch.Generator().manual_seed(tokens + ranks)
    shapes = ((2, tokens, heads[0], 6), (2, tokens, heads[1], 6), (2, tokens, heads[1], 6), (2, tokens, heads[0], 6))
    *inputs, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    intervals = documents_with_blocks(tokens, rows=2)
    whole = [x.clone().requires_grad_() for x in inputs]
    plan = plan_attention(intervals, batch_rows=2, query_tokens=tokens, key_tokens=tokens)
    out = attention(whole[0], key=whole[1], value=whole[2], plan=plan)
    out.backward(upstream)
    expected = (out.detach(), *(x.grad for x in whole))
    results = run_ranks(attend_in_parts, ranks, mode, intervals, tuple(inputs), upstream, sinks, least)
    split = Splitter(ranks, least).of_row(tokens, has_sinks=sinks)
    order = torch.cat([split.order(rank) for rank in range(ranks)])
    for index, value in enumerate(expected):
        found = torch.zeros(2, split.all_tokens, *value.shape[2:], dtype=dtype)
        found[:, order] = torch.cat([result[index] for result in results], 1)
        assert (found[:, :tokens] - value).abs().max() < tolerance, index


@pytest.mark.parametrize("ranks,tokens", [(2, 40), (2, 37), (3, 50), (4, 1), (4, 63)])
def test_ring_attention_equals_one_process_with_gradients(run_ranks: Callable, ranks: int, tokens: int) -> None:
    check(run_ranks, mode="ring", ranks=ranks, tokens=tokens, heads=(4, 2), sinks=tokens == 37)


@pytest.mark.parametrize("ranks,tokens,heads", [(2, 40, (4, 2)), (2, 37, (4, 1)), (3, 50, (6, 2)), (4, 3, (4, 2))])
def test_ulysses_equals_one_process_with_gradients(
    run_ranks: Callable, ranks: int, tokens: int, heads: tuple[int, int]
) -> None:
    check(run_ranks, mode="ulysses", ranks=ranks, tokens=tokens, heads=heads, sinks=tokens == 37)


@pytest.mark.parametrize("mode", ["ring", "ulysses"])
@pytest.mark.parametrize("ranks,tokens,least,rounds", [(2, 61, 5, 3), (3, 90, 5, 3), (2, 130, 1, 8), (4, 33, 2, 3)])
def test_several_rounds_of_chunks_equal_one_process(
    run_ranks: Callable, mode: str, ranks: int, tokens: int, least: int, rounds: int
) -> None:
    assert Splitter(ranks, least).of_row(tokens, has_sinks=False).rounds == rounds
    check(run_ranks, mode=mode, ranks=ranks, tokens=tokens, heads=(12, 2), sinks=tokens == 61, least=least)


def test_bf16_ring_stays_as_near_as_one_process_does(run_ranks: Callable) -> None:
    # values of size 3 with 8 bits: both round the output once, gradients of keys once per part
    check(run_ranks, mode="ring", ranks=2, tokens=45, heads=(2, 1), dtype=torch.bfloat16, tolerance=6e-2)


def test_ulysses_refuses_ranks_that_do_not_divide_the_heads(run_ranks: Callable) -> None:
    assert run_ranks(refusal, 2) == [True, True]


def refusal() -> bool:
    x = torch.zeros(1, 2, 3, 4)
    try:
        UlyssesAttention(build_state(GridDims(cp=2)).cp, backend="torch")(x, key=x, value=x, plan=None)
    except LayoutError as error:
        return "parallel.cp = 2 does not divide the 3 query heads" in str(error)
    return False


def test_a_split_follows_from_a_part_alone() -> None:
    for ranks, least in ((2, 1), (3, 5), (4, 16), (16, 128)):
        splitter = Splitter(ranks, least)
        for tokens in (*range(1, 600), 4095, 8192, 131_072):
            for has_sinks in (False, True):
                split = splitter.of_row(tokens, has_sinks=has_sinks)
                assert splitter.of_part(split.local_tokens) == split
                assert split.rounds == 1 or split.chunk >= least
                assert 0 <= split.chunks * split.chunk - tokens < split.chunks


def test_every_rank_has_the_same_number_of_visible_pairs_under_a_causal_mask() -> None:
    for ranks, rounds in ((2, 1), (3, 1), (4, 3), (8, 2)):
        split = TokenSplit(ranks, 5, has_sinks=False, rounds=rounds)
        pairs = [int((split.order(rank) + 1).sum()) for rank in range(ranks)]
        assert len(set(pairs)) == 1


@pytest.mark.parametrize("is_one_length", [False, True])
@pytest.mark.parametrize("ranks,tokens,seed,is_shared,least", [
    (2, 150, 5, True, WHOLE), (3, 161, 9, True, WHOLE), (4, 161, 9, True, WHOLE), (3, 150, 1, False, WHOLE),
    (2, 161, 6, False, WHOLE), (2, 150, 5, False, 4), (3, 161, 9, True, 9),
])
def test_the_parts_of_a_batch_are_the_batch(
    ranks: int, tokens: int, seed: int, is_shared: bool, least: int, is_one_length: bool
) -> None:
    batch = synthetic_batch(VOCAB, shapes=SHAPES, rows=3, sequence_tokens=tokens, seed=seed, mtp_depth=2)
    splitter = Splitter(ranks, least, is_one_length)
    parts = [cut_batch(batch, rank=rank, splitter=splitter) for rank in range(ranks)]
    counts = parts[0].counts()
    for part in parts[1:]:
        counts = counts + part.counts()
    whole = batch.counts()
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(counts, field.name), getattr(whole, field.name)), field.name
    split = splitter.of_part(parts[0].token_ids.shape[1])
    assert split.has_sinks == (is_shared or is_one_length)  # whether a picture straddles a cut
    for name in ("text_targets", "bit_targets", "visual_cells", "audio_frames", "audio_targets", "speakers"):
        assert_record(name, batch=batch, parts=parts, split=split)
    for rank, part in enumerate(parts):
        kept = split.order(rank) < tokens
        assert torch.equal(part.token_ids[:, kept], batch.token_ids[:, split.order(rank)[kept]])
        assert torch.equal(part.positions[:, kept], batch.positions[:, split.order(rank)[kept]])
        assert not part.kinds[:, ~kept].any() and bool((part.document_ids[:, ~kept] == -1).all())


def assert_record(name: str, *, batch: Batch, parts: list[Batch], split: TokenSplit) -> None:
    """Entries of all parts, put back at their positions and sorted, are those of the batch."""
    local, tokens = split.local_tokens, batch.token_ids.shape[1]
    found: dict[str, list[torch.Tensor]] = {}
    for rank, part in enumerate(parts):
        record = getattr(part, name)
        row, token = record.rows // local, split.order(rank)[record.rows % local]
        found.setdefault("rows", []).append(row * tokens + token)
        for field in dataclasses.fields(record):
            if field.name != "rows":
                found.setdefault(field.name, []).append(getattr(record, field.name))
    joined = {key: torch.cat(values) for key, values in found.items()}
    order, whole = joined["rows"].argsort(stable=True), getattr(batch, name)
    sorted_whole = whole.rows.argsort(stable=True)
    assert whole.rows.numel(), name
    for key, value in joined.items():
        assert torch.equal(value[order], getattr(whole, key)[sorted_whole]), (name, key)


def test_every_frame_that_a_rank_reads_is_whole_there() -> None:
    batch = synthetic_batch(VOCAB, shapes=SHAPES, rows=3, sequence_tokens=161, seed=9)
    for record in ("image_patches", "video_patches"):
        whole = getattr(batch, record)
        for rank in range(4):
            part = cut_batch(batch, rank=rank, splitter=Splitter(4, WHOLE))
            patches, local = getattr(part, record), part.token_ids.shape[1]
            is_sink = patches.rows % local == local - 1
            for frame in patches.frame_ids[~is_sink].unique():
                assert (patches.frame_ids == frame).sum() == (whole.frame_ids == frame).sum()
            assert not part.kinds.flatten()[patches.rows[is_sink]].any()


@pytest.mark.parametrize("ranks,tokens,by,least", [
    (2, 16, 1, WHOLE), (3, 24, 4, WHOLE), (2, 16, 3, WHOLE), (2, 64, 2, 4), (3, 48, 2, 2)
])
def test_shifting_ahead_is_a_roll_of_the_whole_row(
    run_ranks: Callable, ranks: int, tokens: int, by: int, least: int
) -> None:
    x = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, tokens, 3, dtype=torch.float64)
    out = torch.roll(x, -by, dims=1)
    (out * weights).sum().backward()
    split = Splitter(ranks, least).of_row(tokens, has_sinks=False)
    assert split.all_tokens == tokens
    results = run_ranks(shift_part, ranks, x.detach(), weights, by, split)
    for rank, (found, gradient) in enumerate(results):
        assert torch.equal(found, out[:, split.order(rank)])
        assert torch.equal(gradient, x.grad[:, split.order(rank)])


def shift_part(
    x: torch.Tensor, weights: torch.Tensor, by: int, split: TokenSplit
) -> tuple[torch.Tensor, torch.Tensor]:
    order = split.order(dist.get_rank())
    local = x[:, order].requires_grad_()
    out = ShiftAhead.apply(local, by, build_state(GridDims(cp=dist.get_world_size())).cp, split)
    (out * weights[:, order]).sum().backward()
    return out.detach(), local.grad
