"""Which task comes next: exact shares of tokens, one smooth order per stream.

The next task is the one whose tokens so far are the fewest relative to its share, so that every stretch of the stream
holds the mixture, and samples that are longer than others do not tilt it. Each task walks through its samples in a
permutation per epoch; stream s of S takes every S-th place, so that one epoch over all streams uses a sample once.
"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from ernie5.data.draws import draws_of, permutation_of

JITTER_TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Ticket:
    """The `index`-th sample that one stream draws for `task`."""

    task: str
    index: int


@dataclasses.dataclass(frozen=True)
class Place:
    """A sample's number in its pool and the epoch that it is read in."""

    number: int
    epoch: int


class Mixture:
    """Task order of one stream. shares: task -> share (> 0); equal seeds and streams give equal orders."""

    def __init__(self, shares: dict[str, float], *, seed: int, stream: int) -> None:
        self._shares = shares
        self.tokens: dict[str, float] = {}
        self.drawn = dict.fromkeys(shares, 0)
        for task, share in shares.items():
            # Streams start at different places of the cycle, so that the first rows of a step differ in tasks.
            self.tokens[task] = share * JITTER_TOKENS * draws_of("mixture start", seed, stream, task).random()

    def next_task(self, *, without: frozenset[str] = frozenset()) -> str | None:
        """The task that lags most behind its share, None when all are in `without`."""
        open_tasks = [task for task in self._shares if task not in without]
        return min(open_tasks, key=lambda task: self.tokens[task] / self._shares[task]) if open_tasks else None

    def draw(self, task: str) -> Ticket:
        """Take the next sample of `task`."""
        ticket = Ticket(task, self.drawn[task])
        self.drawn[task] += 1
        return ticket

    def charge(self, task: str, *, tokens: int) -> None:
        """Count `tokens` positions that went to `task`."""
        self.tokens[task] += tokens


class SampleOrder:
    """Where the tickets of all streams lead: permutations per (task, epoch), kept for the epochs in use. Safe for
    threads: streams of different workers reach a new epoch at different times."""

    def __init__(self, counts: dict[str, int], *, seed: int, streams: int) -> None:
        self._counts, self._seed, self._streams = counts, seed, streams
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def place(self, ticket: Ticket, *, stream: int) -> Place:
        """Sample number and epoch of the `ticket` of `stream`."""
        count = self._counts[ticket.task]
        epoch, number = divmod(ticket.index * self._streams + stream, count)
        with self._lock:
            if (ticket.task, epoch) not in self._kept:
                for old in [kept for kept in self._kept if kept[0] == ticket.task and kept[1] < epoch - 1]:
                    del self._kept[old]
                self._kept[(ticket.task, epoch)] = permutation_of(count, "order", self._seed, ticket.task, epoch)
            return Place(int(self._kept[(ticket.task, epoch)][number]), epoch)
