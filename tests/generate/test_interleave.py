"""Prompts of all kinds to all kinds of answers, galleries, and the command line's checks."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.data.examples import PromptPart
from ernie5.data.samples import Caption, Sample, SampleMeta
from ernie5.data.shards import ShardWriter, list_shards, open_corpus
from ernie5.errors import CheckpointError, ConfigError, DataError
from ernie5.generate.command import build_parser, check_options, main, read_prompt
from ernie5.generate.gallery import GallerySize, write_samples
from ernie5.generate.interleave import Generation
from ernie5.generate.load import LoadedGeneration
from ernie5.generate.manifest import load_gallery
from ernie5.generate.prompts import words_of_sample


@dataclasses.dataclass(frozen=True)
class _Root:
    """The one section of a RootConfig that prompts need."""

    data: object


@pytest.fixture(scope="module")
def world(build_tiny_world: Callable, tmp_path_factory: pytest.TempPathFactory) -> object:
    return build_tiny_world(tmp_path_factory.mktemp("world"))


def _everything() -> tuple[PromptPart, ...]:
    generator = torch.Generator().manual_seed(0)
    return (
        PromptPart(text="look: "),
        PromptPart(image=torch.rand(3, 16, 16, generator=generator)),
        PromptPart(video=torch.rand(3, 5, 16, 16, generator=generator)),
        PromptPart(audio=torch.rand(3000, generator=generator) * 0.1),
        PromptPart(text=" and then?"),
    )


def test_any_mixture_of_attachments_leads_to_every_kind_of_answer(world: object) -> None:
    generation, prompts = world.generation, [_everything(), (PromptPart(text="a red ball"),)]
    assert all(isinstance(text, str) for text in generation.write(prompts))
    assert generation.draw(prompts).shape == (2, 3, 16, 16)
    assert generation.film(prompts).shape == (2, 3, 5, 16, 16)
    for spoken in generation.speak(prompts, speakers=[None, torch.ones(160)]):
        assert spoken.codes.shape[1] == 2 and len(spoken.waveform) == 1280 * len(spoken.codes)


def test_the_words_of_speech_are_what_is_said_whatever_describes_it(world: object) -> None:
    described = SampleMeta(task="audio", captions=(Caption("en", "a calm voice"),), transcript="good morning")
    data = dataclasses.replace(world.data, caption_languages=("en",))
    assert words_of_sample(Sample("a", described), data=data) == "good morning"
    shown = dataclasses.replace(described, task="image")
    assert words_of_sample(Sample("b", shown), data=data) == "a calm voice"


def test_equal_seeds_draw_equal_pictures_and_other_seeds_others(world: object) -> None:
    config = dataclasses.replace(world.generation.config, bit_temperature=1.0)
    prompts = [(PromptPart(text="a red ball"),)] * 2
    first = world.generation.with_config(config).draw(prompts)
    assert torch.equal(first, world.generation.with_config(config).draw(prompts))
    other = world.generation.with_config(dataclasses.replace(config, seed=5)).draw(prompts)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("media", ["text", "image", "audio"])
def test_every_bit_of_a_seed_counts(world: object, media: str) -> None:
    config = dataclasses.replace(world.generation.config, bit_temperature=1.0, temperature=1.0, audio_temperature=1.0)
    prompts = [(PromptPart(text="a red ball"),)] * 2

    def made(seed: int) -> list:
        drawn = world.generation.with_config(dataclasses.replace(config, seed=seed))
        if media == "text":
            return drawn.write(prompts)
        if media == "image":
            return drawn.draw(prompts).tolist()
        return [spoken.codes.tolist() for spoken in drawn.speak(prompts, speakers=[None, None])]

    seeds = (5, 5 + 2**32, 5 + 2**33, 5 + 2**62)
    results = [made(seed) for seed in seeds]
    assert all(results.count(result) == 1 for result in results)


def test_a_gallery_holds_every_task_with_files_that_exist(world: object, tmp_path: Path) -> None:
    size = GallerySize(pictures=2, clips=2, speeches=2, texts=1)
    write_samples(tmp_path, generation=world.generation, data=world.data, step=7, size=size)
    gallery = load_gallery(tmp_path)
    assert gallery.step == 7
    expected = {f"text_to_{m}" for m in ("image", "video", "audio")} | {"text"}
    expected |= {f"{m}_{end}" for m in ("image", "video", "audio") for end in ("to_text", "reconstruction")}
    assert {item.task for item in gallery.items} == expected
    named = [n for i in gallery.items for n in (i.output_file, i.target_file, i.prompt_file) if n]
    assert named and all((tmp_path / name).stat().st_size > 0 for name in named)
    drawn = [item.split for item in gallery.items if item.task == "text_to_image"]
    assert drawn == ["training", "validation"]


def test_a_gallery_passes_over_what_cannot_be_decoded(world: object, tmp_path: Path) -> None:
    corpus = open_corpus(list_shards(str(world.shards)))
    with ShardWriter(tmp_path, prefix="torn", max_bytes=1 << 24) as writer:
        for ref in corpus.refs:
            sample = corpus.read(ref)
            torn = tuple(dataclasses.replace(media, data=media.data[:30]) for media in sample.media)
            writer.write(dataclasses.replace(sample, media=torn if ref.key.endswith("-0") else sample.media))
    size = GallerySize(pictures=6, clips=6, speeches=6, texts=1)
    path = write_samples(
        tmp_path / "made", generation=world.generation, data=world.data, step=1, shards=(str(tmp_path),), size=size
    )
    tasks = collections.Counter(item.task for item in load_gallery(path.parent).items)
    for medium in ("image", "video", "audio"):  # two of three in each split
        found = [tasks[task] for task in (f"text_to_{medium}", f"{medium}_to_text", f"{medium}_reconstruction")]
        assert found == [4, 2, 2]


def test_a_gallery_draws_pictures_of_an_odd_number_of_cells_and_does_not_read_them(
    world: object, tmp_path: Path
) -> None:
    data = dataclasses.replace(world.data, image_pixels=24, video_pixels=24)
    plain = world.generation
    generation = Generation(plain.decoder.model, tokenizers=plain.tokenizers, data=data, config=plain.config)
    write_samples(tmp_path, generation=generation, data=data, step=7)
    tasks = {item.task for item in load_gallery(tmp_path).items}
    assert {"text_to_image", "text_to_video", "image_reconstruction", "audio_to_text"} <= tasks
    assert not {"image_to_text", "video_to_text"} & tasks


def test_a_model_without_a_modality_says_which_ones_it_has(build_tiny_world: Callable, tmp_path: Path) -> None:
    world = build_tiny_world(tmp_path, modalities=("text",))
    with pytest.raises(CheckpointError, match="no image: model.modalities = text"):
        world.generation.draw([(PromptPart(text="x"),)])
    with pytest.raises(CheckpointError, match="no audio"):
        world.generation.write([(PromptPart(audio=torch.zeros(2000)),)])
    write_samples(tmp_path / "g", generation=world.generation, data=world.data, step=0)
    assert {item.task for item in load_gallery(tmp_path / "g").items} == {"text"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ckpt"], "Nothing to start from"),
        (["ckpt", "--prompt", "x", "--to", "image"], "needs --out"),
        (["ckpt", "--prompt", "x", "--to", "image", "--out", "x.wav"], "must end in .png"),
        (["ckpt", "--prompt", ""], "--prompt is empty"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_loaded(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_options(build_parser().parse_args(arguments))


def test_an_unknown_target_and_a_missing_checkpoint_are_the_user_s_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="invalid choice: 'smell'"):
        main(["ckpt", "--prompt", "x", "--to", "smell"])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        main([str(tmp_path), "--prompt", "x"])


def test_attachments_keep_the_order_of_the_command_line_and_missing_files_are_named(
    world: object, tmp_path: Path
) -> None:
    from ernie5.generate.media import encode_png

    (tmp_path / "a.png").write_bytes(encode_png(torch.zeros(3, 20, 30)))
    arguments = ["c", "--image", str(tmp_path / "a.png"), "--prompt", "hello", "--image", str(tmp_path / "gone.png")]
    parts = build_parser().parse_args(arguments).parts
    assert [kind for kind, _ in parts] == ["image", "prompt", "image"]
    loaded = LoadedGeneration(world.generation, _Root(world.data), 0)
    assert read_prompt(parts[:2], loaded=loaded)[0].image.shape == (3, 16, 16)
    with pytest.raises(DataError, match="gone.png"):
        read_prompt(parts, loaded=loaded)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="bad.png"):
        read_prompt([("image", str(tmp_path / "bad.png"))], loaded=loaded)
