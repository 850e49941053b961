"""`ernie5 data inspect`: what is in some shards, as a table or as json, and a look at a few samples."""

from __future__ import annotations

import collections
import dataclasses
import json

from ernie5.data.samples import SPLITS, Sample
from ernie5.data.shards import Corpus, SampleRef, list_shards, open_corpus
from ernie5.errors import DataError

TEXT_SHOWN = 100


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """Counts of one task: samples, media and description bytes, samples per language and split, seconds of sound or
    film (0 where they have none), characters of text."""

    task: str
    samples: int
    num_bytes: int
    languages: dict[str, int]
    splits: dict[str, int]
    seconds: float
    characters: int


@dataclasses.dataclass(frozen=True)
class CorpusDescription:
    """What `describe_corpus` found; `failures` names samples that do not decode (only looked for when asked)."""

    shards: tuple[str, ...]
    tasks: tuple[TaskSummary, ...]
    examples: tuple[str, ...]
    failures: tuple[str, ...]
    decoded: bool


def describe_corpus(
    patterns: tuple[str, ...], *, split: str | None = None, samples: int = 1, decode: bool = False
) -> CorpusDescription:
    """Open the shards and count. With `decode` every medium is decoded. Raises DataError when shards cannot be read."""
    shards = list_shards(patterns)
    corpus = open_corpus(shards, split=split)
    examples = [
        _show_sample(corpus.read(ref)) for task in corpus.tasks() for ref in corpus.samples(task)[: max(0, samples)]
    ]
    return CorpusDescription(
        shards=tuple(str(path) for path in shards),
        tasks=tuple(_summarise(task, refs=corpus.samples(task)) for task in corpus.tasks()),
        examples=tuple(examples),
        failures=tuple(_find_failures(corpus)) if decode else (),
        decoded=decode,
    )


def _summarise(task: str, *, refs: tuple[SampleRef, ...]) -> TaskSummary:
    languages = collections.Counter(ref.language for ref in refs)
    splits = collections.Counter(ref.split for ref in refs)
    return TaskSummary(
        task=task,
        samples=len(refs),
        num_bytes=sum(ref.num_bytes for ref in refs),
        languages=dict(languages.most_common()),
        splits={name: splits[name] for name in SPLITS},
        seconds=round(sum(ref.seconds or 0.0 for ref in refs), 1),
        characters=sum(ref.characters for ref in refs),
    )


def _find_failures(corpus: Corpus) -> list[str]:
    from ernie5.data.decode import decode_audio, decode_image, decode_video  # loads torch

    failures = []
    for ref in corpus.refs:
        try:
            sample = corpus.read(ref)
            for media in sample.media:
                if ref.task == "audio":
                    decode_audio(media.data, name=ref.key)
                elif ref.task == "video":
                    decode_video(media.data, pixels=8, name=ref.key)
                else:
                    decode_image(media.data, pixels=8, name=ref.key)
        except DataError as error:
            failures.append(str(error))
    return failures


def _show_sample(sample: Sample) -> str:
    meta = sample.meta
    if meta.segments:
        said = " | ".join(f"[{s.image}]" if s.text is None else s.text for s in meta.segments)
    else:
        said = meta.text or meta.transcript or " / ".join(f"{c.language}: {c.text}" for c in meta.captions)
    said = " ".join(said.split())
    media = ", ".join(f"{item.name} {len(item.data)} B" for item in sample.media)
    shown = said if len(said) <= TEXT_SHOWN else said[: TEXT_SHOWN - 3] + "..."
    return f"{meta.task} {sample.key}" + (f" ({media})" if media else "") + f": {shown}"


def print_description(description: CorpusDescription, *, as_json: bool) -> None:
    """Print to stdout, either one json object or a table."""
    if as_json:
        print(json.dumps(dataclasses.asdict(description), ensure_ascii=False))
        return
    print(f"{len(description.shards)} shard(s), first {description.shards[0]}")
    heads = f"{'samples':>8} {'train':>7} {'valid.':>7} {'bytes':>12} {'minutes':>8} {'characters':>11}"
    print(f"{'task':<6} {heads}  languages")
    for task in description.tasks:
        languages = " ".join(f"{name}:{count}" for name, count in task.languages.items())
        print(
            f"{task.task:<6} {task.samples:>8} {task.splits['train']:>7} {task.splits['validation']:>7} "
            f"{task.num_bytes:>12} {task.seconds / 60:>8.1f} {task.characters:>11}  {languages}"
        )
    for example in description.examples:
        print(example)
    if description.decoded:
        print(f"{len(description.failures)} sample(s) cannot be decoded")
    for failure in description.failures:
        print(f"  {failure}")
