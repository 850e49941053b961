"""Packing and collating: media whole, text continued, borders kept, awkward lengths."""

from __future__ import annotations

import pytest
import torch

from ernie5.data.collate import Layout, collate_rows, mtp_targets
from ernie5.data.document import Document, Shapes, cut_text
from ernie5.data.mixture import Mixture, SampleOrder, Ticket
from ernie5.data.pack import Packer
from ernie5.data.synthetic import TASKS, synthetic_batch, synthetic_document
from ernie5.errors import DataError
from ernie5.records import TokenKind
from ernie5.tokenizers.vocab import Vocab

VOCAB = Vocab(text_size=300, audio_levels=2, audio_codes=8)
SHAPES = Shapes(bits=4, feature_channels=5, patch_pixels=2, audio_levels=2, audio_codes=8, num_scales=4)


def _document(task: str, seed: int, tokens: int) -> Document:
    return synthetic_document(VOCAB, shapes=SHAPES, task=task, seed=seed, text_tokens=tokens)


def _packer(row_tokens: int, *, shares: dict[str, float], lengths: int = 30, window: int = 4, text_tokens: int = 0):
    return Packer(
        Mixture(shares, seed=0, stream=0),
        fetch=lambda ticket: (_document(ticket.task, ticket.index, 1 + (7 * ticket.index) % lengths),),
        row_tokens=row_tokens,
        window=window,
        text_tokens=text_tokens,
    )


@pytest.mark.parametrize("row_tokens", [63, 64, 97, 256])
def test_rows_never_overflow_and_media_documents_stay_whole(row_tokens: int) -> None:
    packer = _packer(row_tokens, shares={"text": 1.0, "text_to_image": 1.0, "audio_to_text": 0.5}, lengths=12)
    for _ in range(20):
        row = packer.next_row()
        assert sum(part.length for part in row) == row_tokens
        for part in row:
            if not part.is_text:
                assert part.token_ids[0] == VOCAB.bos and part.token_ids[-1] == VOCAB.eos


def test_long_text_is_continued_in_later_rows_without_losing_a_target() -> None:
    packer = _packer(16, shares={"text": 1.0}, lengths=100)
    parts = [part for _ in range(40) for part in packer.next_row()]
    ids = torch.cat([part.token_ids for part in parts])
    targets = sum(len(part.text_targets.rows) for part in parts)
    ends = int((ids == VOCAB.eos).sum())
    assert targets == len(ids) - ends
    whole = [_document("text", n, 1 + (7 * n) % 100).token_ids for n in range(60)]
    assert torch.equal(ids, torch.cat(whole)[: len(ids)])
    assert all(part.positions[0].tolist() == [0, 0, 0] for part in parts)


def test_the_last_position_of_a_cut_predicts_the_first_token_behind_it() -> None:
    document = _document("text", 3, 9)
    left, right = cut_text(document, 0, stop=5), cut_text(document, 5, stop=document.length)
    assert left.text_targets.rows.tolist() == [0, 1, 2, 3, 4]
    assert left.text_targets.ids[-1] == right.token_ids[0]
    assert right.intervals[0].tolist() == [0, 0, 0, right.length]


def test_text_tokens_limits_the_part_of_one_row() -> None:
    packer = _packer(32, shares={"text": 1.0}, lengths=100, text_tokens=10)
    assert all(part.length <= 10 for part in packer.next_row())


def test_without_text_the_rest_of_a_row_is_padding_and_waiting_media_come_first() -> None:
    packer = _packer(64, shares={"text_to_image": 1.0}, lengths=12, window=2)
    keys = [part.key for _ in range(12) for part in packer.next_row()]
    assert len(keys) == len(set(keys))
    waiting = [number for _, number, _ in packer.state().waiting]
    numbers = sorted(int(key.rsplit("-", 1)[1]) for key in keys)
    assert sorted(numbers + waiting) == list(range(len(numbers) + len(waiting)))


def test_a_packer_restored_between_rows_goes_on_alike() -> None:
    shares = {"text": 1.0, "text_to_image": 1.0}
    packer, other = _packer(63, shares=shares), _packer(63, shares=shares)
    for _ in range(5):
        packer.next_row()
    other.restore(packer.state())
    for _ in range(5):
        left, right = packer.next_row(), other.next_row()
        assert [(p.key, p.token_ids.tolist()) for p in left] == [(p.key, p.token_ids.tolist()) for p in right]


def test_the_documents_of_a_long_page_all_find_a_row_and_a_restored_packer_keeps_them() -> None:
    def make() -> Packer:
        return Packer(
            Mixture({"page": 1.0}, seed=0, stream=0), row_tokens=64, window=2,
            fetch=lambda ticket: tuple(_document("text", 10 * ticket.index + part, 25 + 3 * part) for part in range(4)),
        )

    packer, other = make(), make()
    keys = [part.key for _ in range(6) for part in packer.next_row()]
    other.restore(packer.state())
    keys += [part.key for _ in range(6) for part in other.next_row()]
    waiting = [f"synthetic-text-{10 * index + part}" for _, index, part in other.state().waiting]
    expected = [f"synthetic-text-{10 * index + part}" for index in range(len(keys)) for part in range(4)]
    assert sorted(keys + waiting) == sorted(expected[: len(keys) + len(waiting)])


def test_a_corpus_without_one_usable_sample_ends_in_an_error_not_a_loop() -> None:
    packer = Packer(Mixture({"text": 1.0}, seed=0, stream=0), fetch=lambda _: None, row_tokens=8, window=1)
    with pytest.raises(DataError, match="had to be skipped"):
        packer.next_row()


def test_every_sample_is_used_once_per_epoch_over_all_streams() -> None:
    order = SampleOrder({"text": 7}, seed=0, streams=3)
    places = [order.place(Ticket("text", index), stream=stream) for index in range(7) for stream in range(3)]
    for epoch in range(3):
        assert sorted(place.number for place in places if place.epoch == epoch) == list(range(7))


def test_forty_documents_in_a_row_keep_their_borders() -> None:
    row = tuple(_document("text", n, 1) for n in range(40))
    batch = collate_rows([row], layout=Layout(123, VOCAB.pad, 1))
    assert batch.document_ids[0, :120].tolist() == [n // 3 for n in range(120)]
    assert batch.document_ids[0, 120:].tolist() == [-1] * 3
    assert batch.intervals[0, 119].tolist() == [119, 0, 0, 120]
    assert batch.intervals[0, 122].tolist() == [122, 0, 0, 123]
    assert (batch.kinds[0, 120:] == TokenKind.PADDING).all()
    assert not (batch.text_targets.rows % 3 == 2).any() and len(batch.text_targets.rows) == 80


def test_a_batch_without_media_carries_empty_records_of_full_width() -> None:
    batch = collate_rows([(_document("text", 0, 61),)], layout=Layout(63, VOCAB.pad, 2))
    assert batch.image_patches.pixels.shape == (0, 4, 12) and batch.video_patches.features.shape == (0, 16, 5)
    assert batch.visual_cells.latents.shape == (0, 4) and batch.bit_targets.bits.shape == (0, 4)
    assert batch.audio_frames.codes.shape == (0, 2) and batch.speakers.features.shape == (0, 160)
    assert batch.bit_targets.is_video.dtype == torch.bool and float(batch.counts().tokens) == 63


def test_mtp_predicts_text_of_one_document_from_all_but_understanding_positions() -> None:
    batch = synthetic_batch(VOCAB, shapes=SHAPES, rows=3, sequence_tokens=150, seed=2, mtp_depth=2)
    ids, kinds, documents = batch.token_ids.flatten(), batch.kinds.flatten(), batch.document_ids.flatten()
    silent = (kinds == TokenKind.IMAGE_UNDERSTANDING) | (kinds == TokenKind.VIDEO_UNDERSTANDING)
    for depth, targets in enumerate(batch.mtp_targets):
        reach = depth + 2
        expected = [
            row
            for row in range(len(ids) - reach)
            if (kinds[row + 1 : row + reach + 1] == TokenKind.TEXT).all()
            and not silent[row]
            and (documents[row : row + reach + 1] == documents[row]).all()
            and row // 150 == (row + reach) // 150
        ]
        assert targets.rows.tolist() == expected
        assert torch.equal(targets.ids, ids[targets.rows + reach])


@pytest.mark.parametrize(("task", "has_term"), [("text_to_image", True), ("image_to_text", False)])
def test_mtp_starts_at_the_last_cell_of_a_drawn_picture_but_not_of_a_seen_one(task: str, has_term: bool) -> None:
    batch = collate_rows([(_document(task, 0, 3),)], layout=Layout(120, VOCAB.pad, 1))
    cells = (batch.kinds[0] != TokenKind.TEXT) & (batch.kinds[0] != TokenKind.PADDING)
    last = int(cells.nonzero()[-1])
    assert (last in batch.mtp_targets[0].rows.tolist()) == has_term


def test_rows_shorter_than_the_reach_of_mtp_have_no_terms() -> None:
    ones = torch.ones(2, 2, dtype=torch.int64)
    assert mtp_targets(ones, kinds=ones, document_ids=ones, depth=1)[0].rows.tolist() == []


def test_rows_and_frames_of_a_batch_are_shifted_to_their_place() -> None:
    row = (_document("image_to_text", 0, 3), _document("video_to_text", 1, 3), _document("page", 2, 3))
    tokens = sum(part.length for part in row)
    batch = collate_rows([row, row], layout=Layout(tokens, VOCAB.pad, 0))
    for record, kind in (
        (batch.image_patches, TokenKind.IMAGE_UNDERSTANDING),
        (batch.video_patches, TokenKind.VIDEO_UNDERSTANDING),
    ):
        assert record.rows.tolist() == (batch.kinds.flatten() == kind).nonzero().flatten().tolist()
    frames = torch.cat([batch.image_patches.frame_ids.flatten(), batch.video_patches.frame_ids.flatten()])
    assert frames.unique().tolist() == list(range(2 * (1 + 8 + 2)))
    pictures, clips = (record.frame_ids.unique().tolist() for record in (batch.image_patches, batch.video_patches))
    assert not set(pictures) & set(clips)


@pytest.mark.parametrize("sequence_tokens", [3, 63, 257])
def test_synthetic_batches_repeat_and_hold_every_kind(sequence_tokens: int) -> None:
    one, two = (
        synthetic_batch(VOCAB, shapes=SHAPES, rows=len(TASKS), sequence_tokens=sequence_tokens, seed=1)
        for _ in range(2)
    )
    assert torch.equal(one.token_ids, two.token_ids) and torch.equal(one.bit_targets.bits, two.bit_targets.bits)
    assert int(one.token_ids.max()) < VOCAB.size_head
    if sequence_tokens == 257:
        assert set(one.kinds.flatten().tolist()) >= set(range(1, 7))
