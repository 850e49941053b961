"""Layouts of SPEC section 2: who stands where, who sees whom, who predicts what."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.data.collate import Layout, collate_rows
from ernie5.data.decode import SAMPLE_RATE, decode_audio
from ernie5.data.document import Document
from ernie5.data.examples import POOLS, ExampleMaker, PromptPart
from ernie5.data.lengths import SampleRuler, shortest_documents
from ernie5.data.samples import Caption, Sample, SampleMeta
from ernie5.data.shards import list_shards, open_corpus
from ernie5.errors import DataError
from ernie5.records import TokenKind


@pytest.fixture
def maker(tiny_data, tiny_tokenizers) -> ExampleMaker:
    return ExampleMaker(tiny_data, tokenizers=tiny_tokenizers, seed=1, training=False)


@pytest.fixture
def sample_of(tiny_data):
    corpus = open_corpus(list_shards(tiny_data.shards))
    refs = {ref.key: ref for ref in corpus.refs}
    return lambda key: corpus.read(refs[key])


def _names(document: Document, vocab) -> list[str]:
    return [p.name if p.space == "special" else "word" for p in map(vocab.describe, document.token_ids.tolist())]


def _targets(document: Document) -> dict[int, int]:
    return dict(zip(document.text_targets.rows.tolist(), document.text_targets.ids.tolist(), strict=True))


def test_a_drawn_picture_follows_the_layout(maker, sample_of, tiny_tokenizers) -> None:
    document, vocab = maker.build_document(sample_of("image-1"), task="text_to_image"), tiny_tokenizers.vocab
    names = _names(document, vocab)
    boi = names.index("boi")
    assert names[0] == "bos" and names[boi - 1] == "sep" and names[-2:] == ["eoi", "eos"]
    cells = document.visual_cells
    assert cells.scales.tolist() == [1] * 4 + [2] * 9 + [3] * 16 + [4] * 16
    assert cells.rows.tolist() == list(range(boi + 1, document.length - 2))
    bits = document.bit_targets
    assert bits.rows.tolist() == [boi, *range(boi + 1, boi + 30)]
    assert bits.scales.tolist() == [0] + [1] * 4 + [2] * 9 + [3] * 16
    assert bits.weights.mean().item() == pytest.approx(1.0, abs=1e-6)
    targets = _targets(document)
    assert boi not in targets and targets[document.length - 3] == vocab.eoi
    assert not set(range(boi + 1, document.length - 3)) & set(targets)
    assert targets[document.length - 2] == vocab.eos and targets[boi - 1] == vocab.boi
    assert document.positions[boi].tolist() == [boi] * 3
    assert document.positions[boi + 1].tolist() == [boi + 1, boi + 1.5, boi + 1.5]
    assert document.positions[-2].tolist() == [boi + 5] * 3


def test_blocks_see_themselves_whole_and_nothing_later(maker, sample_of) -> None:
    document = maker.build_document(sample_of("image-1"), task="text_to_image")
    starts, cells = document.intervals[:, 0], document.visual_cells
    for scale in (1, 2, 3, 4):
        rows = cells.rows[cells.scales == scale]
        assert (starts[rows] == rows[0]).all()
    text = document.kinds == TokenKind.TEXT
    assert (starts[text] == torch.arange(document.length)[text]).all()
    assert (document.intervals[:, 3] == document.length).all() and (document.intervals[:, 1:3] == 0).all()


def test_the_finished_frame_predicts_the_first_scale_of_the_next_one(maker, sample_of, tiny_tokenizers) -> None:
    document = maker.build_document(sample_of("video-0"), task="text_to_video")
    cells, bits = document.visual_cells, document.bit_targets
    finished = cells.rows[cells.scales == 4]
    assert len(finished) == 8 and cells.scales.tolist() == [1] * 4 + [4] * 4 + [1] * 4 + [4] * 4
    first_scale = bits.rows[bits.scales == 0].tolist()
    assert first_scale == [document.length - 2 - 16 - 1, int(finished[3])]
    targets = _targets(document)
    assert int(finished[3]) not in targets and targets[int(finished[7])] == tiny_tokenizers.vocab.eov
    assert bits.is_video.all()
    assert document.positions[finished, 0].diff().tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_understanding_positions_carry_features_and_no_loss(maker, sample_of, tiny_tokenizers) -> None:
    image = maker.build_document(sample_of("image-1"), task="image_to_text")
    assert _names(image, tiny_tokenizers.vocab)[:9] == ["bos", "boi"] + ["image_und"] * 4 + ["eoi", "sep", "word"]
    assert image.image_patches.pixels.shape == (4, 4, 192) and image.image_patches.features.shape == (4, 4, 8)
    assert image.image_patches.places[1].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert not set(image.image_patches.rows.tolist() + [1]) & set(_targets(image))
    assert (image.intervals[2:6, 0] == 2).all()
    assert image.positions[2].tolist() == [2, 2.5, 2.5] and image.positions[6].tolist() == [6] * 3
    video = maker.build_document(sample_of("video-0"), task="video_to_text")
    assert video.video_patches.pixels.shape == (2, 16, 192) and video.num_frames == 8
    assert video.video_patches.frame_ids[:, ::4].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert video.intervals[2:4, 0].tolist() == [2, 3]


def test_a_clip_of_one_frame_is_a_clip_whose_frame_repeats(maker, tiny_data, tiny_tokenizers, sample_of) -> None:
    one_frame = dataclasses.replace(tiny_data, video_frames=1)
    short = ExampleMaker(one_frame, tokenizers=tiny_tokenizers, seed=1, training=False)
    video = short.build_document(sample_of("video-0"), task="video_to_text")
    prompt = maker.build_prompt((PromptPart(video=torch.zeros(3, 1, 16, 16)),), target="text")
    for patches in (video.video_patches, prompt.video_patches):
        assert patches.pixels.shape == (1, 16, 192)
        assert patches.frame_ids[0, ::4].tolist() == [0, 1, 2, 3]
        assert (patches.pixels.unflatten(1, (4, 4)) == patches.pixels[:, None, :4]).all()
        assert (patches.features.unflatten(1, (4, 4)) == patches.features[:, None, :4]).all()


def test_pixels_of_a_patch_are_channel_major_and_come_from_its_place(maker) -> None:
    picture = torch.zeros(3, 32, 32) - 1.0
    picture[1, 8:16, 24:32] = 1.0
    prompt = maker.build_prompt((PromptPart(image=picture),), target="text")
    patches = prompt.image_patches
    lit = (patches.pixels > 0).any(dim=-1)
    assert patches.places[lit].tolist() == [[1, 3]]
    assert (patches.pixels[lit][0].reshape(3, 64) > 0).all(dim=1).tolist() == [False, True, False]


def test_speech_is_predicted_frame_by_frame_and_ends_at_every_level(maker, sample_of, tiny_tokenizers) -> None:
    spoken, vocab = maker.build_document(sample_of("audio-3"), task="text_to_audio"), tiny_tokenizers.vocab
    names = _names(spoken, vocab)
    boa, frames = names.index("boa"), spoken.audio_frames
    assert names[boa - 2 : boa] == ["sep", "spk"] and names[-2:] == ["eoa", "eos"] and len(frames.rows) == 5
    assert spoken.audio_targets.rows.tolist() == [boa, *frames.rows.tolist()]
    assert torch.equal(spoken.audio_targets.codes[:-1], frames.codes)
    assert spoken.audio_targets.codes[-1].tolist() == [vocab.audio_codes] * 2
    assert not {boa - 1, boa, *frames.rows.tolist()} & set(_targets(spoken))
    assert spoken.speakers.rows.tolist() == [boa - 1] and spoken.speakers.features.shape == (1, 160)
    heard = maker.build_document(sample_of("audio-3"), task="audio_to_text")
    assert not len(heard.audio_targets.rows) and torch.equal(heard.audio_frames.codes, frames.codes)
    assert not {1, *heard.audio_frames.rows.tolist()} & set(_targets(heard))


@pytest.mark.parametrize("target", ["text", "image", "video", "audio"])
def test_a_prompt_is_the_beginning_of_the_training_document(maker, sample_of, target: str) -> None:
    key = {"text": "image-1", "image": "image-1", "video": "video-0", "audio": "audio-3"}[target]
    sample = sample_of(key)
    if target == "text":
        from ernie5.data.decode import decode_image

        parts = (PromptPart(image=decode_image(sample.media[0].data, pixels=32)),)
        document = maker.build_document(sample, task="image_to_text")
    else:
        parts = (PromptPart(text=sample.meta.transcript or sample.meta.captions[0].text),)
        document = maker.build_document(sample, task=f"text_to_{target}")
    prompt = maker.build_prompt(parts, target=target)
    n = prompt.length
    assert torch.equal(prompt.token_ids, document.token_ids[:n])
    assert torch.equal(prompt.positions, document.positions[:n])
    assert torch.equal(prompt.intervals[:, 0], document.intervals[:n, 0])
    assert torch.equal(prompt.image_patches.features, document.image_patches.features)


def test_dropping_the_condition_leaves_bos_sep_and_the_begin_token(tiny_data, tiny_tokenizers, sample_of) -> None:
    config = dataclasses.replace(tiny_data, condition_drop=1.0)
    maker = ExampleMaker(config, tokenizers=tiny_tokenizers, seed=1, training=True)
    document = maker.build_document(sample_of("image-1"), task="text_to_image")
    names = _names(document, tiny_tokenizers.vocab)
    assert names[:4] == ["bos", "sep", "boi", "image_gen"]
    prompt = maker.build_prompt((PromptPart(text="ignored"),), target="image", drop_condition=True)
    assert _names(prompt, tiny_tokenizers.vocab) == ["bos", "sep", "boi"]


def test_training_draws_depend_on_epoch_and_sample_alone(tiny_data, tiny_tokenizers, sample_of) -> None:
    makers = [ExampleMaker(tiny_data, tokenizers=tiny_tokenizers, seed=1, training=True) for _ in range(2)]
    one, same = (maker.build_document(sample_of("image-1"), task="text_to_image", epoch=4) for maker in makers)
    assert torch.equal(one.visual_cells.latents, same.visual_cells.latents)
    assert torch.equal(one.token_ids, same.token_ids)
    other = makers[0].build_document(sample_of("image-1"), task="text_to_image", epoch=5)
    assert not torch.equal(one.visual_cells.latents[-16:], other.visual_cells.latents[-16:])


def test_past_frames_can_be_hidden_by_a_window(tiny_data, tiny_tokenizers, sample_of) -> None:
    window = dataclasses.replace(tiny_data.video_attention, window_frames=1)
    config = dataclasses.replace(tiny_data, video_attention=window)
    maker = ExampleMaker(config, tokenizers=tiny_tokenizers, seed=1, training=False)
    document = maker.build_document(sample_of("video-0"), task="text_to_video")
    rows = document.visual_cells.rows
    start, end = int(rows[8]), document.length
    assert document.intervals[rows[:8], 1:3].tolist() == [[start, end]] * 8
    assert (document.intervals[rows[8:], 1:3] == 0).all()
    batch = collate_rows([(document, document)], layout=Layout(2 * document.length, 0, 0))
    shifted = batch.intervals[0, document.length + rows[:8], 1:3]
    assert shifted.tolist() == [[start + document.length, end + document.length]] * 8


def test_pages_alternate(maker, sample_of, tiny_tokenizers) -> None:
    (short,) = maker.build_documents(sample_of("page-0"), task="page")
    names = _names(short, tiny_tokenizers.vocab)
    eoi = names.index("eoi")
    assert eoi in _targets(short) and names[eoi + 1] == "word"


@pytest.mark.parametrize("tokens", [7, 8, 9, 64])
def test_a_page_longer_than_a_row_goes_on_without_losing_a_token_or_a_target(
    tiny_data, tiny_tokenizers, sample_of, tokens: int
) -> None:
    def parts_of(sequence_tokens: int) -> tuple[Document, ...]:
        config = dataclasses.replace(tiny_data, sequence_tokens=sequence_tokens)
        maker = ExampleMaker(config, tokenizers=tiny_tokenizers, seed=1, training=False)
        sample = sample_of("page-2")
        segments = (*sample.meta.segments, *sample.meta.segments[:2])
        sample = dataclasses.replace(sample, meta=SampleMeta("page", segments=segments))
        return maker.build_documents(sample, task="page")

    (whole,), parts = parts_of(4096), parts_of(tokens)
    assert len(parts) > 1 and all(part.length <= tokens for part in parts)
    assert torch.equal(torch.cat([part.token_ids for part in parts]), whole.token_ids)
    assert torch.equal(torch.cat([part.text_targets.ids for part in parts]), whole.text_targets.ids)
    assert torch.equal(torch.cat([part.image_patches.pixels for part in parts]), whole.image_patches.pixels)


def test_a_picture_of_a_page_that_no_row_holds_is_named(tiny_data, tiny_tokenizers, sample_of) -> None:
    config = dataclasses.replace(tiny_data, sequence_tokens=6)
    maker = ExampleMaker(config, tokenizers=tiny_tokenizers, seed=1, training=False)
    with pytest.raises(DataError, match="picture of sample page-0 takes 6 positions"):
        maker.build_documents(sample_of("page-0"), task="page")


def test_media_longer_than_a_row_and_samples_without_parts_are_named(tiny_data, tiny_tokenizers, sample_of) -> None:
    maker = ExampleMaker(
        dataclasses.replace(tiny_data, sequence_tokens=40), tokenizers=tiny_tokenizers, seed=0, training=False
    )
    with pytest.raises(DataError, match="image-1 takes .* data.sequence_tokens = 40"):
        maker.build_document(sample_of("image-1"), task="text_to_image")
    bare = Sample("bare", SampleMeta(task="image", captions=(Caption("en", "x"),)))
    with pytest.raises(DataError, match="bare has no image"):
        maker.build_document(bare, task="text_to_image")
    with pytest.raises(DataError, match="image-1 has no words"):
        sample = sample_of("image-1")
        maker.build_document(
            dataclasses.replace(sample, meta=SampleMeta(task="image")), task="text_to_image"
        )


@pytest.mark.parametrize("task", ["image_to_text", "text_to_image", "video_to_text", "text_to_video", "page"])
def test_lengths_known_before_any_sample_are_those_of_its_document(
    tiny_data, tiny_tokenizers, sample_of, task: str
) -> None:
    needed = shortest_documents(tiny_data, visual=tiny_tokenizers.visual)[task]
    maker = ExampleMaker(tiny_data, tokenizers=tiny_tokenizers, seed=1, training=False)
    key = next(f"{medium}-0" for medium in ("image", "video", "page") if medium in task)
    document = maker.build_documents(sample_of(key), task=task)[0]
    words = sum(tiny_tokenizers.vocab.describe(token).space == "text" for token in document.token_ids.tolist())
    assert document.length - words == needed + (task == "page")  # a page also has BOS


@pytest.mark.parametrize("key", ["image-0", "video-1", "audio-0", "audio-5"])
def test_the_ruler_measures_the_longest_document_that_training_would_build(
    tiny_data, tiny_tokenizers, sample_of, key: str
) -> None:
    sample = sample_of(key)
    maker = ExampleMaker(tiny_data, tokenizers=tiny_tokenizers, seed=1, training=False)
    tasks = [task for task, pool in POOLS.items() if pool == sample.meta.task]
    seconds = len(decode_audio(sample.media[0].data)) / SAMPLE_RATE if sample.meta.task == "audio" else None
    need = SampleRuler(tiny_data, tokenizers=tiny_tokenizers).longest(sample.meta, seconds=seconds)
    assert need.positions == max(maker.build_document(sample, task=task).length for task in tasks)
    assert need.positions == maker.build_document(sample, task=need.task).length


def test_features_are_computed_once_and_the_cache_forgets_the_oldest(
    tiny_data, tiny_tokenizers, sample_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual, passes = tiny_tokenizers.visual, []
    encode = visual.encode_frames
    monkeypatch.setattr(visual, "encode_frames", lambda frames: passes.append(1) or encode(frames))
    maker = ExampleMaker(tiny_data, tokenizers=tiny_tokenizers, seed=0, training=False)
    for task in ("image_to_text", "text_to_image", "image_to_text"):
        maker.build_document(sample_of("image-1"), task=task)
    assert len(passes) == 1
    assert (maker.cache.misses, maker.cache.hits) == (2, 2)  # what is seen, and its projection to what is drawn
    none = ExampleMaker(
        dataclasses.replace(tiny_data, cache_megabytes=0), tokenizers=tiny_tokenizers, seed=0, training=False
    )
    for _ in range(2):
        none.build_document(sample_of("image-1"), task="image_to_text")
    assert (none.cache.misses, none.cache.hits, len(passes)) == (2, 0, 3)
