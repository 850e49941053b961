"""Documents to rows of fixed length: media whole, text cut wherever a row ends and continued in a later row.

A row first takes media documents that waited for room, oldest first, then whatever the mixture asks for. A medium that
does not fit waits (at most `window` at a time); once the waiting room is full, text fills the row to its last position,
or, without text in the mixture, padding does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ernie5.data.collate import Row
from ernie5.data.document import Document, cut_text
from ernie5.data.mixture import Mixture, Ticket
from ernie5.errors import DataError

TEXT = "text"
MAX_SKIPS = 1000


@dataclasses.dataclass(frozen=True)
class PackState:
    """All that a packer remembers between rows; small and JSON-able by `dataclasses.asdict`.

    tokens, drawn: the mixture's counts per task; waiting: (task, ticket, document of the ticket) of media without a row
    yet; text, text_start: the text that is being cut and the first position that no row holds yet.
    """

    tokens: tuple[tuple[str, float], ...]
    drawn: tuple[tuple[str, int], ...]
    waiting: tuple[tuple[str, int, int], ...]
    text: int | None
    text_start: int


@dataclasses.dataclass(frozen=True)
class _Waiting:
    """A document that waits for room: the `part`-th of its ticket."""

    ticket: Ticket
    part: int
    document: Document


class Packer:
    """Packs one stream. `fetch` turns a ticket into its documents (a text or a medium is one, a long page several), or
    None for a sample that has to be skipped."""

    def __init__(
        self,
        mixture: Mixture,
        *,
        fetch: Callable[[Ticket], tuple[Document, ...] | None],
        row_tokens: int,
        window: int,
        text_tokens: int = 0,
    ) -> None:
        self._mixture, self._fetch = mixture, fetch
        self._row_tokens, self._window = row_tokens, window
        self._text_tokens = text_tokens or row_tokens
        self._waiting: list[_Waiting] = []
        self._text: tuple[Ticket, Document] | None = None
        self._text_start = 0

    def next_row(self) -> Row:
        """The next row: documents of together at most row_tokens positions, at least one.

        Raises DataError when 1000 samples in a row had to be skipped.
        """
        parts: list[Document] = []
        room = self._row_tokens
        for item in list(self._waiting):
            if item.document.length <= room:
                self._waiting.remove(item)
                parts.append(item.document)
                room -= item.document.length
        closed: frozenset[str] = frozenset()
        while room:
            if len(self._waiting) >= self._window:
                closed = frozenset(self._mixture.drawn) - {TEXT}
            task = self._mixture.next_task(without=closed)
            if task is None:
                break
            if task == TEXT:
                part = self._take_text(room)
            else:
                part = self._take_medium(task, room=room)
            if part is not None:
                parts.append(part)
                room -= part.length
        return tuple(parts)

    def state(self) -> PackState:
        """What `restore` needs to go on with the next row."""
        return PackState(
            tokens=tuple(self._mixture.tokens.items()),
            drawn=tuple(self._mixture.drawn.items()),
            waiting=tuple((item.ticket.task, item.ticket.index, item.part) for item in self._waiting),
            text=self._text[0].index if self._text else None,
            text_start=self._text_start,
        )

    def restore(self, state: PackState) -> None:
        """Go back to `state`; waiting media and the open text are read again. Raises DataError if one is gone."""
        if {task for task, _ in state.drawn} != set(self._mixture.drawn):
            raise DataError(
                f"the stored data cursor has the tasks {', '.join(task for task, _ in state.drawn)}, the mixture has "
                f"{', '.join(self._mixture.drawn)}. Resume with the shards and data.mixture of the run, or start "
                "--fresh."
            )
        self._mixture.tokens = dict(state.tokens)
        self._mixture.drawn = dict(state.drawn)
        self._waiting = [self._reread(Ticket(task, index), part=part) for task, index, part in state.waiting]
        text = None if state.text is None else self._reread(Ticket(TEXT, state.text), part=0)
        self._text = None if text is None else (text.ticket, text.document)
        self._text_start = state.text_start

    def _reread(self, ticket: Ticket, *, part: int) -> _Waiting:
        documents = self._fetch(ticket)
        if documents is None or part >= len(documents):
            raise DataError(
                f"sample {ticket.index} of task {ticket.task} could be read when the checkpoint was written and cannot "
                "now. Restore the shards of the run, or start --fresh."
            )
        return _Waiting(ticket, part, documents[part])

    def _draw(self, task: str) -> tuple[Ticket, tuple[Document, ...]]:
        for _ in range(MAX_SKIPS):
            ticket = self._mixture.draw(task)
            documents = self._fetch(ticket)
            if documents is not None:
                return ticket, documents
        raise DataError(f"{MAX_SKIPS} samples in a row had to be skipped for task {task}; the log names each.")

    def _take_medium(self, task: str, *, room: int) -> Document | None:
        ticket, documents = self._draw(task)
        self._mixture.charge(task, tokens=sum(document.length for document in documents))
        fits = documents[0].length <= room
        for part in range(int(fits), len(documents)):
            self._waiting.append(_Waiting(ticket, part, documents[part]))
        return documents[0] if fits else None

    def _take_text(self, room: int) -> Document:
        if self._text is None:
            ticket, documents = self._draw(TEXT)
            self._text, self._text_start = (ticket, documents[0]), 0
        document, start = self._text[1], self._text_start
        stop = min(start + min(room, self._text_tokens), document.length)
        part = document if (start, stop) == (0, document.length) else cut_text(document, start, stop=stop)
        self._text_start = stop
        if stop == document.length:
            self._text, self._text_start = None, 0
        self._mixture.charge(TEXT, tokens=part.length)
        return part
