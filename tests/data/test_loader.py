"""The stream: the same global batches at any number of ranks and workers, and exact resumption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging

import pytest
import torch

from ernie5.data.config import RampStageConfig, VideoAttentionConfig
from ernie5.data.loader import Loader, StepShape, build_loader, merge_states
from ernie5.data.samples import Sample, SampleMeta
from ernie5.data.shards import ShardWriter
from ernie5.errors import ConfigError, DataError, LayoutError
from ernie5.records import TokenKind

SHAPE = StepShape(global_sequences=8, micro_sequences=2)
STAGES = (RampStageConfig(steps=2, global_sequences=4), RampStageConfig(steps=1, global_sequences=8))
RAMP = StepShape(12, 1, ramp=STAGES)
GOLDEN_STREAM = "0025da518e0d1c3c"


def _open(
    tiny_data, tiny_tokenizers, *, rank: int = 0, size: int = 1, seed: int = 3, shape: StepShape = SHAPE, **changes
) -> Loader:
    config = dataclasses.replace(tiny_data, **changes)
    return build_loader(config, tokenizers=tiny_tokenizers, shape=shape, seed=seed, dp_rank=rank, dp_size=size)


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for field in dataclasses.fields(value) for t in _tensors(getattr(value, field.name))]
    return [t for item in value for t in _tensors(item)] if isinstance(value, tuple) else []


def _same(left: list, right: list) -> bool:
    pairs = list(zip(_tensors(tuple(left)), _tensors(tuple(right)), strict=True))
    keys = [batch.sample_keys for batch in left] == [batch.sample_keys for batch in right]
    return keys and all(torch.equal(a, b) for a, b in pairs)


def test_golden_stream(tiny_data, tiny_tokenizers) -> None:
    """Four steps of every task, all that no encoder's rounding decides: a new digest is a new order of the data, after
    which no older checkpoint resumes exactly."""
    hiding = VideoAttentionConfig(window_frames=1, mask_probability=0.3)
    loader, digest = _open(tiny_data, tiny_tokenizers, video_attention=hiding), hashlib.sha256()
    for batch in (batch for _ in range(4) for batch in loader.next_step()):
        exact = (batch.token_ids, batch.kinds, batch.positions, batch.document_ids, batch.intervals,
                 batch.text_targets, batch.mtp_targets, batch.visual_cells.scales, batch.bit_targets.rows,
                 batch.bit_targets.scales, batch.bit_targets.weights, batch.audio_targets.rows, batch.speakers.rows,
                 batch.image_patches.frame_ids, batch.video_patches.frame_ids, batch.video_patches.places)
        digest.update(b"".join(tensor.contiguous().numpy().tobytes() for tensor in _tensors(exact)))
        digest.update(repr(batch.sample_keys).encode())
    assert digest.hexdigest()[:16] == GOLDEN_STREAM


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
def test_the_stream_is_the_same_with_any_number_of_workers(tiny_data, tiny_tokenizers, workers: int) -> None:
    inline = _open(tiny_data, tiny_tokenizers)
    ahead = _open(tiny_data, tiny_tokenizers, workers=workers)
    for _ in range(3):
        assert _same(inline.next_step(), ahead.next_step())
    assert inline.state_dict() == ahead.state_dict()
    ahead.close()
    assert _same(inline.next_step(), ahead.next_step())
    ahead.close()


@pytest.mark.parametrize("size", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(tiny_data, tiny_tokenizers, size: int) -> None:
    whole = _open(tiny_data, tiny_tokenizers)
    ranks = [_open(tiny_data, tiny_tokenizers, rank=rank, size=size) for rank in range(size)]
    for _ in range(2):
        assert _same(whole.next_step(), [batch for rank in ranks for batch in rank.next_step()])


def test_resuming_repeats_and_skips_nothing_and_may_change_the_number_of_ranks(tiny_data, tiny_tokenizers) -> None:
    straight = _open(tiny_data, tiny_tokenizers)
    ranks = [_open(tiny_data, tiny_tokenizers, rank=rank, size=2, workers=1) for rank in range(2)]
    for _ in range(3):
        straight.next_step()
        for rank in ranks:
            rank.next_step()
    stored = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
    for rank in ranks:
        rank.close()
    assert stored["streams"] == json.loads(json.dumps(straight.state_dict()))["streams"]
    resumed = _open(tiny_data, tiny_tokenizers)
    resumed.load_state_dict(stored)
    assert resumed.step == 3
    for _ in range(3):
        assert _same(straight.next_step(), resumed.next_step())
    assert len(json.dumps(stored)) < 10_000


def test_a_run_that_goes_on_with_larger_steps_reads_on_where_it_stood(tiny_data, tiny_tokenizers) -> None:
    def texts_per_stream(*rows_of_steps: int) -> list[list[list[int]]]:
        streams: list[list[list[int]]] = [[] for _ in range(tiny_data.streams)]
        state = None
        for rows in rows_of_steps:
            shape = StepShape(rows * tiny_data.streams, 1)
            loader = build_loader(tiny_data, tokenizers=tiny_tokenizers, shape=shape, seed=3)
            if state is not None:
                loader.load_state_dict(state)
            for place, row in enumerate(loader.next_rows()):
                streams[place // rows].append([token for part in row for token in part.token_ids.tolist()])
            state = loader.state_dict()
        return streams

    assert texts_per_stream(1, 2) == texts_per_stream(3)


def test_a_ramp_takes_more_rows_from_the_same_streams_at_any_number_of_ranks_and_workers(
    tiny_data, tiny_tokenizers
) -> None:
    whole = _open(tiny_data, tiny_tokenizers, shape=RAMP)
    ranks = [_open(tiny_data, tiny_tokenizers, shape=RAMP, rank=0, size=2, workers=3),
             _open(tiny_data, tiny_tokenizers, shape=RAMP, rank=1, size=2)]
    streams: list[list] = [[] for _ in range(tiny_data.streams)]
    for rows in (4, 4, 8, 12, 12):
        batches = whole.next_step()
        assert len(batches) == rows
        assert _same(batches, [batch for rank in ranks for batch in rank.next_step()])
        for place, batch in enumerate(batches):
            streams[place * tiny_data.streams // rows].append(batch)
    ranks[0].close()
    even = _open(tiny_data, tiny_tokenizers, shape=StepShape(40, 1))
    assert _same([batch for stream in streams for batch in stream], even.next_step())


def test_resuming_inside_a_ramp_and_across_its_stages_repeats_and_skips_nothing(tiny_data, tiny_tokenizers) -> None:
    straight = _open(tiny_data, tiny_tokenizers, shape=RAMP)
    steps = [straight.next_step() for _ in range(5)]
    ranks = [_open(tiny_data, tiny_tokenizers, shape=RAMP, rank=rank, size=2, workers=1) for rank in range(2)]
    for expected in steps[1:]:
        for rank in ranks:
            rank.next_step()
        resumed = _open(tiny_data, tiny_tokenizers, shape=RAMP)
        resumed.load_state_dict(json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks]))))
        assert _same(expected, resumed.next_step())
    for rank in ranks:
        rank.close()


def test_another_seed_gives_other_batches_and_an_equal_seed_equal_ones(tiny_data, tiny_tokenizers) -> None:
    first = _open(tiny_data, tiny_tokenizers).next_step()
    assert _same(first, _open(tiny_data, tiny_tokenizers).next_step())
    assert not _same(first, _open(tiny_data, tiny_tokenizers, seed=4).next_step())


def test_a_sample_that_cannot_be_decoded_is_skipped_counted_once_and_named(
    tiny_data, tiny_tokenizers, caplog: pytest.LogCaptureFixture
) -> None:
    loader = _open(tiny_data, tiny_tokenizers)
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            loader.next_step()
    assert loader.num_skipped == 1
    assert [r.message for r in caplog.records if "image-bad" in r.message and "skipped" in r.message]


def test_a_share_that_no_sample_can_serve_is_said_once(
    tiny_data, tiny_tokenizers, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    with ShardWriter(tmp_path, prefix="text", max_bytes=1 << 20) as writer:
        writer.write(Sample("text-0", SampleMeta(task="text", text="the cat barks", split="train")))
        writer.write(Sample("text-1", SampleMeta(task="text", text="the dog purrs", split="validation")))
        writer.write(Sample("image-0", SampleMeta(task="image", text="two cats", split="train")))
    config = dataclasses.replace(tiny_data, shards=(str(tmp_path / "*.tar"),))
    with caplog.at_level(logging.INFO):
        for split in ("train", "validation"):  # both are opened at a start
            build_loader(config, tokenizers=tiny_tokenizers, shape=StepShape(4, 1), seed=3, split=split)
    said = [record.message for record in caplog.records]
    assert sum("data.mixture.text_to_video" in line and "hold no video" in line for line in said) == 1, said
    assert [line for line in said if "text_to_image" in line] == [
        "data.mixture.text_to_image = 2 is left out of validation: none of its samples is image"], said


def test_every_epoch_uses_every_text_once(tiny_data, tiny_tokenizers) -> None:
    mixture = dataclasses.replace(
        tiny_data.mixture, **{name: 0.0 for name in vars(tiny_data.mixture) if name not in ("text", "_origin")}
    )
    loader = _open(tiny_data, tiny_tokenizers, mixture=mixture, streams=1)
    bos, heads = tiny_tokenizers.vocab.bos, []
    while len(heads) < 16:
        for row in loader.next_rows():
            heads += [part.key for part in row if part.token_ids[0] == bos]
    assert sorted(heads[:8]) == sorted(set(heads)) == sorted(heads[8:16])
    assert heads[:8] != heads[8:16]


def test_rows_are_full_when_text_is_in_the_mixture(tiny_data, tiny_tokenizers) -> None:
    loader = _open(tiny_data, tiny_tokenizers)
    for _ in range(4):
        assert all((batch.kinds != TokenKind.PADDING).all() for batch in loader.next_step())


def test_shares_are_shares_of_tokens(tiny_data, tiny_tokenizers) -> None:
    loader = _open(tiny_data, tiny_tokenizers, streams=1)
    used: dict[str, int] = {}
    for _ in range(36):
        for row in loader.next_rows():
            for part in row:
                used[part.task] = used.get(part.task, 0) + part.length
    shares = {task: getattr(tiny_data.mixture, task) for task in used}
    for task, share in shares.items():
        expected = sum(used.values()) * share / sum(shares.values())
        assert used[task] == pytest.approx(expected, rel=0.25, abs=400)  # one whole page may be ahead


def test_rows_that_do_not_divide_are_refused_with_numbers_that_work(tiny_data, tiny_tokenizers) -> None:
    with pytest.raises(LayoutError, match=r"streams = 4 is not a multiple of dp = 3.*1, 2, 4"):
        _open(tiny_data, tiny_tokenizers, size=3)
    with pytest.raises(LayoutError, match="global_sequences = 8 is not a multiple"):
        _open(tiny_data, tiny_tokenizers, streams=3)
    with pytest.raises(ConfigError, match="micro_sequences = 3"):
        build_loader(tiny_data, tokenizers=tiny_tokenizers, shape=StepShape(8, 3), seed=0)
    ramp = (RampStageConfig(steps=1, global_sequences=6),)
    with pytest.raises(LayoutError, match=r"ramp\[0\].global_sequences = 6 is not a multiple of data.streams = 4"):
        _open(tiny_data, tiny_tokenizers, shape=StepShape(8, 1, ramp=ramp))


def test_a_cursor_of_another_run_is_refused(tiny_data, tiny_tokenizers) -> None:
    state = _open(tiny_data, tiny_tokenizers).state_dict()
    with pytest.raises(DataError, match="train.seed"):
        _open(tiny_data, tiny_tokenizers, seed=9).load_state_dict(state)
    half = _open(tiny_data, tiny_tokenizers, size=2).state_dict()
    with pytest.raises(DataError, match="stream 2"):
        _open(tiny_data, tiny_tokenizers).load_state_dict(half)


def test_an_error_in_a_worker_reaches_the_training_loop(tiny_data, tiny_tokenizers) -> None:
    loader = _open(tiny_data, tiny_tokenizers, workers=2)
    loader.maker.build_document = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        loader.next_step()


def _texts(folder, count: int) -> str:
    with ShardWriter(folder, prefix="t", max_bytes=1 << 20) as writer:
        for n in range(count):
            writer.write(Sample(f"t-{n}", SampleMeta(task="text", text=f"cat {n} barks", split="train")))
    return str(folder / "*.tar")


def test_resuming_with_other_samples_in_the_same_files_is_said(
    tiny_data, tiny_tokenizers, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = (_texts(tmp_path, 5),)
    state = json.loads(json.dumps(_open(tiny_data, tiny_tokenizers, shards=shards).state_dict()))
    _open(tiny_data, tiny_tokenizers, shards=shards).load_state_dict(state)
    _open(tiny_data, tiny_tokenizers, shards=shards).load_state_dict({k: state[k] for k in state if k != "contents"})
    assert "other samples" not in caplog.text
    _texts(tmp_path, 7)
    _open(tiny_data, tiny_tokenizers, shards=shards).load_state_dict(state)
    assert "the shards hold other samples than when the checkpoint was written (text 5, now 7)" in caplog.text


def test_a_split_without_samples_names_the_ways_out(tiny_data, tiny_tokenizers, tmp_path) -> None:
    config = dataclasses.replace(tiny_data, shards=(_texts(tmp_path, 3),))
    with pytest.raises(DataError, match=r'no sample for validation .*"split": "validation".*add shards'):
        build_loader(config, tokenizers=tiny_tokenizers, shape=StepShape(4, 1), seed=3, split="validation")
