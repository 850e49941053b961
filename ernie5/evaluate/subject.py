"""What is being measured: a model with its tokenizers, and the two splits of one corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from ernie5.data.collate import Layout, collate_rows
from ernie5.data.config import DataConfig
from ernie5.data.document import Document, cut_text
from ernie5.data.draws import torch_seed
from ernie5.data.examples import POOLS
from ernie5.data.samples import Sample
from ernie5.data.shards import Corpus, SampleRef
from ernie5.errors import DataError
from ernie5.evaluate.config import EvaluateConfig
from ernie5.generate.interleave import Generation
from ernie5.generate.prompts import decode_sample
from ernie5.records import Batch, ModelOutput

# Rows are padded to a multiple of this, so that the kernels see few different lengths.
ROW_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model under test. `generation` holds the model and its tokenizers; `data` the settings of its training."""

    generation: Generation
    data: DataConfig
    config: EvaluateConfig
    corpus: Corpus

    def has(self, modality: str) -> bool:
        """Whether the model was built with `modality`."""
        return modality in self.generation.decoder.model.config.modalities

    def refs(self, task: str, *, split: str) -> tuple[SampleRef, ...]:
        """All samples of one kind in one split, sorted by key."""
        return tuple(ref for ref in self.corpus.samples(task) if ref.split == split)

    def samples(self, task: str, *, split: str, count: int) -> list[Sample]:
        """`count` samples (0: all) drawn evenly by the seed, in the order of their keys."""
        refs = self.refs(task, split=split)
        if 0 < count < len(refs):
            generator = torch.Generator().manual_seed(torch_seed(self.config.seed))
            chosen = sorted(torch.randperm(len(refs), generator=generator)[:count].tolist())
            refs = tuple(refs[index] for index in chosen)
        return [self.corpus.read(ref) for ref in refs]

    def decoded(self, medium: str, *, split: str, count: int) -> list[tuple[Sample, torch.Tensor]]:
        """`samples` with their picture, clip or sound; those that cannot be decoded are left out."""
        found = []
        for sample in self.samples(medium, split=split, count=count):
            try:
                found.append((sample, decode_sample(sample, medium=medium, data=self.data)))
            except DataError:  # as training, which names it in its log
                continue
        return found

    def shuffled(self, task: str, *, split: str) -> Iterator[Sample]:
        """All samples in an order drawn by the seed, read one by one, so that any beginning stands for the whole."""
        refs = self.refs(task, split=split)
        generator = torch.Generator().manual_seed(torch_seed(self.config.seed))
        for index in torch.randperm(len(refs), generator=generator).tolist():
            yield self.corpus.read(refs[index])

    def documents(self, task: str, *, split: str, count: int, has_draws: bool = False) -> list[Document]:
        """Documents of a task of the mixture, with training's random draws or without; samples that do not fit are
        left out."""
        maker = self.generation.maker.with_draws() if has_draws else self.generation.maker
        documents = []
        for sample in self.samples(POOLS[task], split=split, count=count):
            try:
                documents += maker.build_documents(sample, task=task)
            except DataError:
                continue
        return documents

    def cut(self, document: Document) -> list[Document]:
        """A text document in pieces of at most one training row; every token stays a target exactly once."""
        rows = self.data.sequence_tokens
        starts = range(0, document.length, rows)
        return [cut_text(document, start, stop=min(start + rows, document.length)) for start in starts]

    @torch.no_grad()
    def run(self, documents: Sequence[Document]) -> Iterator[tuple[ModelOutput, Batch]]:
        """Forward passes over `documents`, one per row, neighbours of like length together."""
        model = self.generation.decoder.model
        device = model.final_norm.weight.device
        ordered = sorted(documents, key=lambda document: document.length)
        size = self.config.batch_rows
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            longest = -(-part[-1].length // ROW_MULTIPLE) * ROW_MULTIPLE
            layout = Layout(longest, self.generation.tokenizers.vocab.pad, model.config.mtp.depth)
            batch = collate_rows([(document,) for document in part], layout=layout).to(device)
            yield model(batch), batch


def keep_text_targets(document: Document, *, num_ids: int) -> Document:
    """Leave only targets that are text ids: specials such as EOS code no bytes."""
    targets = document.text_targets
    kept = targets.ids < num_ids
    return dataclasses.replace(
        document, text_targets=dataclasses.replace(targets, rows=targets.rows[kept], ids=targets.ids[kept])
    )
