"""Which ranks are still there, and where each stands: asked when a collective fails or a step does not end.

Every rank listens on a port of its own, beside the collectives, and answers with one line. A connection that is
refused means a process that has ended; none at all, a machine that cannot be reached. The kernel accepts connections
for a process that is stopped or deep in a library, so a slow rank is not mistaken for a lost one. Torch-free.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import enum
import json
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence

from ernie5.observe.standing import list_ranks

CONNECT_SECONDS = 4.0  # a lost first packet is sent again after one second, and once more after three
ANSWER_SECONDS = 5.0  # a rank deep in its step shares the interpreter with the thread that answers
PARALLEL = 64
MOST_NAMED = 4
BEYOND = "192.0.2.1"  # an address that belongs to nobody (RFC 5737): whatever route leads there is the way out


class Presence(enum.Enum):
    """What a rank's port says."""

    ANSWERS = "answers"
    SILENT = "is there and says nothing: stopped, or held up inside a library"
    ENDED = "has ended"
    UNREACHABLE = "is unreachable: its machine or the network to it is down"


@dataclasses.dataclass(frozen=True)
class Peer:
    """Where a rank listens; host: its machine's name; token: tells it from a stranger that took the port over."""

    rank: int
    host: str
    address: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.address})"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one rank said; standing: where its main thread is, "" unless it answered."""

    presence: Presence
    standing: str = ""


class Listener:
    """This rank's port. standing: called in a thread of its own for each question; is_one_host: whether only ranks of
    this machine ask."""

    def __init__(
        self, rank: int, *, master: str, standing: Callable[[], str], is_one_host: bool = True
    ) -> None:
        self._standing = standing
        address = own_address(master, is_one_host=is_one_host)
        self._socket = socket.create_server((address, 0), backlog=PARALLEL)
        address, port = self._socket.getsockname()[:2]
        self.peer = Peer(rank, socket.gethostname(), address, port, secrets.token_hex(8))
        threading.Thread(target=self._answer, name="peers", daemon=True).start()

    def close(self) -> None:
        """Stop listening: from now on this rank has ended."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()

    def _answer(self) -> None:
        while True:
            try:
                asked, _ = self._socket.accept()
            except OSError:
                return
            with asked, contextlib.suppress(OSError):
                asked.settimeout(ANSWER_SECONDS)
                asked.sendall(json.dumps({"token": self.peer.token, "standing": self._standing()}).encode())


class Peers:
    """All ranks' ports, by rank, and this rank's own listener."""

    def __init__(self, listener: Listener, *, others: Mapping[int, Peer]) -> None:
        self._listener, self._others = listener, dict(others)
        self.rank = listener.peer.rank

    @property
    def neighbour(self) -> Peer | None:
        """The next rank in the ring that is on another machine: each machine has somebody who looks after it."""
        size, own = len(self._others) + 1, self._listener.peer
        ring = [self._others[(self.rank + step) % size] for step in range(1, size)]
        return next((peer for peer in ring if peer.host != own.host), None)

    def is_reachable(self, peer: Peer) -> bool:
        """False only where its machine does not answer at all."""
        return _ask(peer).presence != Presence.UNREACHABLE

    def ask(self, ranks: Sequence[int]) -> dict[int, Answer]:
        """Ask `ranks`, this one left out, all at a time; takes some seconds at most per PARALLEL ranks."""
        wanted = [self._others[rank] for rank in ranks if rank in self._others]
        with concurrent.futures.ThreadPoolExecutor(PARALLEL) as pool:
            return dict(zip([peer.rank for peer in wanted], pool.map(_ask, wanted), strict=True))

    def explain(self, ranks: Sequence[int]) -> str:
        """One sentence: who of `ranks` is missing, else who of all; else where the others stand."""
        answers = self.ask(ranks or tuple(self._others))
        if ranks and all(answer.presence == Presence.ANSWERS for answer in answers.values()):
            answers = self.ask(tuple(self._others))
        for presence in (Presence.UNREACHABLE, Presence.ENDED, Presence.SILENT):
            missing = [rank for rank, answer in answers.items() if answer.presence == presence]
            if missing:
                named = ", ".join(str(self._others[rank]) for rank in missing[:MOST_NAMED])
                more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
                return f"{named}{more} {presence.value}"
        places: dict[str, list[int]] = {}
        for rank, answer in answers.items():
            places.setdefault(answer.standing, []).append(rank)
        told = [f"rank {list_ranks(members)} in {place}" for place, members in places.items()]
        return f"all ranks answer: {'; '.join(told[:MOST_NAMED])}"

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


def own_address(master: str, *, is_one_host: bool) -> str:
    """The address of this machine on the way to `master`, which is how the others reach it. Sends nothing.

    Of several hosts, the master's own may know itself by a loopback name alone, as Debian's /etc/hosts has it: there it
    is the address on the way out.
    """
    for target in (master,) if is_one_host else (master, BEYOND):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            found = str(probe.getsockname()[0])
            if is_one_host or not found.startswith("127."):
                return found
    return "127.0.0.1"


def _ask(peer: Peer) -> Answer:
    try:
        connection = socket.create_connection((peer.address, peer.port), timeout=CONNECT_SECONDS)
    except ConnectionRefusedError:
        return Answer(Presence.ENDED)
    except OSError:
        return Answer(Presence.UNREACHABLE)
    with connection:
        try:
            connection.settimeout(ANSWER_SECONDS)
            said = b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError:
            return Answer(Presence.SILENT)
    try:
        found = json.loads(said)
        is_same = found["token"] == peer.token
    except (ValueError, KeyError, TypeError):
        return Answer(Presence.ENDED)
    return Answer(Presence.ANSWERS, str(found["standing"])) if is_same else Answer(Presence.ENDED)
