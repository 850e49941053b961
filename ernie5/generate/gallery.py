"""A handful of samples per modality from a corpus, beside their originals: what a run looks like from outside."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ernie5.data.config import DataConfig
from ernie5.data.examples import PromptPart
from ernie5.data.samples import Sample
from ernie5.data.shards import Corpus, SampleRef, list_shards, open_corpus
from ernie5.errors import DataError
from ernie5.generate import media
from ernie5.generate.interleave import Generation
from ernie5.generate.manifest import Gallery, GalleryItem, save_gallery
from ernie5.generate.prompts import decode_sample, words_of_sample

TEXT_PROMPT_CHARACTERS = 60


@dataclasses.dataclass(frozen=True)
class GallerySize:
    """Samples per task."""

    pictures: int = 8
    clips: int = 4
    speeches: int = 4
    texts: int = 4


def write_samples(
    folder: Path,
    *,
    generation: Generation,
    data: DataConfig,
    step: int,
    shards: tuple[str, ...] | None = None,
    size: GallerySize = GallerySize(),
) -> Path:
    """Write a gallery of generated and reconstructed samples of `shards` (default: data.shards); returns samples.json.

    Half of the prompts of generation come from training, half from validation; understanding and reconstruction use
    validation alone. Modalities that the model or the corpus lacks are left out, and so are samples that cannot be
    decoded and pictures of a size that can be drawn but not read. Raises DataError, EnvironmentFault.
    """
    start = time.monotonic()
    painter = _Painter(folder, generation=generation, data=data, shards=shards or data.shards)
    items: list[GalleryItem] = []
    for medium, count in (("image", size.pictures), ("video", size.clips), ("audio", size.speeches)):
        if medium in generation.decoder.model.config.modalities:
            items += painter.make(medium, count=count)
            items += painter.read(medium, count=count)
            items += painter.reconstruct(medium, count=count)
    items += painter.write(count=size.texts)
    return save_gallery(folder, gallery=Gallery(step, time.monotonic() - start, tuple(items)))


class _Painter:
    def __init__(
        self, folder: Path, *, generation: Generation, data: DataConfig, shards: tuple[str, ...]
    ) -> None:
        self._folder, self._generation, self._data = folder, generation, data
        self._corpus = open_corpus(list_shards(shards))

    def make(self, medium: str, *, count: int) -> list[GalleryItem]:
        """Text to `medium`, with the original beside it."""
        half = (count + 1) // 2
        shown = [*self._shown(medium, split="train", count=half)]
        shown += self._shown(medium, split="validation", count=count - half)
        if not shown:
            return []
        words = [self._words(sample) for _, sample, _ in shown]
        prompts = [(PromptPart(text=text),) for text in words]
        if medium == "image":
            made = list(self._generation.draw(prompts))
        elif medium == "video":
            made = list(self._generation.film(prompts))
        else:
            hear = self._generation.maker.hear
            speakers = [hear(original).speaker for _, _, original in shown]
            made = [spoken.waveform for spoken in self._generation.speak(prompts, speakers=speakers)]
        return [
            GalleryItem(
                task=f"text_to_{medium}", split=_name_of(split), prompt=text,
                output_file=self._save(f"text_to_{medium}-{index}", value=value, medium=medium),
                target_file=self._save(f"text_to_{medium}-{index}-original", value=original, medium=medium),
            )
            for index, ((split, _, original), text, value) in enumerate(zip(shown, words, made, strict=True))
        ]

    def read(self, medium: str, *, count: int) -> list[GalleryItem]:
        """`medium` to text, with the reference beside it."""
        shown = self._shown(medium, split="validation", count=count)
        if not shown or not self._generation.can_read(medium):
            return []
        part: Callable[[torch.Tensor], PromptPart] = {
            "image": lambda value: PromptPart(image=value),
            "video": lambda value: PromptPart(video=value),
            "audio": lambda value: PromptPart(audio=value),
        }[medium]
        texts = self._generation.write([(part(value),) for _, _, value in shown])
        return [
            GalleryItem(
                task=f"{medium}_to_text", split="validation", output=text, target=self._words(sample),
                prompt_file=self._save(f"{medium}_to_text-{index}", value=value, medium=medium),
            )
            for index, ((_, sample, value), text) in enumerate(zip(shown, texts, strict=True))
        ]

    def reconstruct(self, medium: str, *, count: int) -> list[GalleryItem]:
        """`medium` through its tokenizer and back."""
        items = []
        for index, (_, sample, value) in enumerate(self._shown(medium, split="validation", count=count)):
            name = f"{medium}_reconstruction-{index}"
            items.append(
                GalleryItem(
                    task=f"{medium}_reconstruction", split="validation", prompt=self._words(sample),
                    output_file=self._save(name, value=self._reconstruct(value, medium), medium=medium),
                    target_file=self._save(f"{name}-original", value=value, medium=medium),
                )
            )
        return items

    def write(self, *, count: int) -> list[GalleryItem]:
        """The beginnings of validation texts, continued."""
        found = [sample.meta.text or "" for _, sample in self._samples("text", split="validation", count=count)]
        starts = [_cut_words(text, characters=TEXT_PROMPT_CHARACTERS) for text in found]
        texts = self._generation.write([(PromptPart(text=start),) for start in starts]) if starts else []
        return [
            GalleryItem(task="text", split="validation", prompt=start, output=text)
            for start, text in zip(starts, texts, strict=True)
        ]

    def _samples(self, task: str, *, split: str, count: int) -> list[tuple[str, Sample]]:
        """`count` samples spread evenly over the sorted keys of a split, in the caption language of the run."""
        languages = self._data.caption_languages
        refs = [ref for ref in self._corpus.samples(task) if ref.split == split]
        if task == "audio" and languages:
            refs = [ref for ref in refs if ref.language in languages] or refs
        return [(split, self._corpus.read(ref)) for ref in spread_refs(refs, count=count)]

    def _words(self, sample: Sample) -> str:
        return words_of_sample(sample, data=self._data)

    def _shown(self, medium: str, *, split: str, count: int) -> list[tuple[str, Sample, torch.Tensor]]:
        """`_samples` with their picture, clip or sound; those that cannot be decoded are left out, as in training."""
        found = []
        for _, sample in self._samples(medium, split=split, count=count):
            try:
                found.append((split, sample, decode_sample(sample, medium=medium, data=self._data)))
            except DataError:
                continue
        return found

    @torch.no_grad()
    def _reconstruct(self, value: torch.Tensor, medium: str) -> torch.Tensor:
        tokenizers = self._generation.tokenizers
        if medium == "image":
            return tokenizers.visual.reconstruct(value[None, :, None])[0, :, 0]
        if medium == "video":
            return tokenizers.visual.reconstruct(value[None])[0]
        codes = tokenizers.audio.encode(value[None])[:, :, : tokenizers.audio_levels]
        return tokenizers.audio.decode(codes)[0, : len(value)]

    def _save(self, name: str, *, value: torch.Tensor, medium: str) -> str:
        if medium == "image":
            name, content = f"{name}.png", media.encode_png(value)
        elif medium == "video":
            speed = self._generation.config.frames_per_second
            name, content = f"{name}.mp4", media.encode_mp4(value, frames_per_second=speed)
        else:
            rate = self._generation.tokenizers.audio.sample_rate
            name, content = f"{name}.wav", media.encode_wav(value, sample_rate=rate)
        media.write_file(self._folder / name, content=content)
        return name


def _name_of(split: str) -> str:
    return "training" if split == "train" else split


def spread_refs(refs: Sequence[SampleRef], *, count: int) -> list[SampleRef]:
    """`count` of `refs` at equal distances, so that every source of a sorted corpus shows up."""
    if count <= 0 or not refs:
        return []
    return [refs[place * len(refs) // min(count, len(refs))] for place in range(min(count, len(refs)))]


def _cut_words(text: str, *, characters: int) -> str:
    """The first `characters` characters, less a word that the cut would break."""
    if len(text) <= characters:
        return text
    head = text[:characters]
    return head[: head.rindex(" ")] if " " in head[characters // 2 :] else head
