"""One logical stream: tickets to samples to documents to rows, a pure function of (seed, stream, row number)."""

from __future__ import annotations

import logging
import threading
import zlib

from ernie5.data.collate import Row
from ernie5.data.config import DataConfig
from ernie5.data.document import Document
from ernie5.data.examples import POOLS, ExampleMaker
from ernie5.data.mixture import Mixture, SampleOrder, Ticket
from ernie5.data.pack import Packer, PackState
from ernie5.data.shards import Corpus, SampleRef
from ernie5.errors import DataError, TokenizerError

LOG = logging.getLogger(__name__)


class SampleSource:
    """Documents of a corpus by ticket, for all streams of a process. Safe for threads; counts what it skips.

    split: the one that the corpus holds. What no shard has, the source of `train` says for both.
    """

    def __init__(self, corpus: Corpus, *, config: DataConfig, maker: ExampleMaker, seed: int, split: str) -> None:
        shares = vars(config.mixture)
        self.shares = {task: shares[task] for task, pool in POOLS.items() if shares[task] and corpus.samples(pool)}
        if not self.shares:
            raise DataError(
                f"no task of data.mixture has samples: the shards hold {', '.join(corpus.tasks())}. Give the mixture a "
                "share for one of them, or add shards."
            )
        for task in sorted(task for task, pool in POOLS.items() if shares[task] and task not in self.shares):
            share, pool = shares[task], POOLS[task]
            if pool in corpus.elsewhere:
                LOG.info("data.mixture.%s = %g is left out of %s: none of its samples is %s", task, share, split, pool)
            elif split == "train":
                LOG.info("data.mixture.%s = %g is left out: these shards hold no %s", task, share, pool)
        self.maker = maker
        self._corpus = corpus
        counts = {task: len(corpus.samples(POOLS[task])) for task in self.shares}
        self.contents = {pool: contents_of(corpus.samples(pool)) for pool in {POOLS[task] for task in self.shares}}
        self._order = SampleOrder(counts, seed=seed, streams=config.streams)
        self._lock = threading.Lock()
        self._named: set[str] = set()

    @property
    def num_skipped(self) -> int:
        """Samples that could not be used so far, each counted once."""
        return len(self._named)

    def fetch(self, ticket: Ticket, *, stream: int) -> tuple[Document, ...] | None:
        """The documents of `ticket`, several for a long page; None, with one line in the log per sample, when it cannot
        be used."""
        place = self._order.place(ticket, stream=stream)
        ref = self._corpus.samples(POOLS[ticket.task])[place.number]
        try:
            with self._lock:  # a corpus seeks in one open file per shard
                sample = self._corpus.read(ref)
            return self.maker.build_documents(sample, task=ticket.task, epoch=place.epoch)
        except (DataError, TokenizerError) as error:
            self._skip(ref, error)
            return None

    def _skip(self, ref: SampleRef, error: Exception) -> None:
        with self._lock:
            known = ref.key in self._named
            self._named.add(ref.key)
        if not known:
            LOG.warning("skipped sample %s (%d so far): %s", ref.key, self.num_skipped, error)


def contents_of(refs: tuple[SampleRef, ...]) -> list[int]:
    """[number of samples, checksum of their keys]: where either differs, the same ticket means another sample."""
    checksum = 0
    for ref in refs:
        checksum = zlib.crc32(ref.key.encode("utf-8", errors="surrogateescape"), checksum)
    return [len(refs), checksum]


class Stream:
    """The rows of one stream, in order, with a state that resumes behind the last row taken."""

    def __init__(self, number: int, *, source: SampleSource, config: DataConfig, seed: int) -> None:
        self.number = number
        self._packer = Packer(
            Mixture(source.shares, seed=seed, stream=number),
            fetch=lambda ticket: source.fetch(ticket, stream=number),
            row_tokens=config.sequence_tokens,
            window=config.pack_window,
            text_tokens=config.text_tokens,
        )

    def next_row(self) -> Row:
        """The next packed row."""
        return self._packer.next_row()

    def state(self) -> PackState:
        """The cursor behind the last row."""
        return self._packer.state()

    def restore(self, state: PackState) -> None:
        """Continue from `state`."""
        self._packer.restore(state)
