"""What a run says when another rank is gone: who, and in which collective it was missed."""

from __future__ import annotations

import os
import socket
import threading
import typing
from collections.abc import Callable

from ernie5.errors import PeerError
from ernie5.observe.peers import Listener, Peer, Peers
from ernie5.observe.standing import standing_of_error, standing_of_thread

if typing.TYPE_CHECKING:
    from ernie5.engine.interface import Engine  # loads torch, and this module is needed to say that torch is broken

SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "gloo/transport",
    "NCCL communicator was aborted",
)
RESUMES = "Start the run again to resume"
BEGINS = "There is no checkpoint yet: start the run again, and it begins at its first step"


def meet_peers(engine: Engine) -> Peers | None:
    """Open this rank's port and learn those of the others; collective. None where there are no others."""
    if engine.world_size == 1:
        return None
    main, hosts = threading.get_ident(), {one["host"] for one in engine.gather({"host": socket.gethostname()})}
    listener = Listener(
        engine.rank, master=os.environ.get("MASTER_ADDR", "127.0.0.1"), standing=lambda: str(standing_of_thread(main)),
        is_one_host=len(hosts) == 1,
    )
    found = [Peer(**one) for one in engine.gather(vars(listener.peer))]
    return Peers(listener, others={peer.rank: peer for peer in found if peer.rank != engine.rank})


def as_peer_error(
    error: BaseException, *, peers: Peers | None, can_resume: Callable[[], bool], step: int = 0
) -> PeerError | None:
    """The PeerError that `error` means, None where it means something else. can_resume: whether there is anything to go
    on from, asked only where it is said.

    Collectives and the store where ranks meet say in many words that somebody is gone; a port in use is another matter.
    """
    from_store = any(kind.__name__ == "DistError" for kind in type(error).__mro__) and "EADDRINUSE" not in str(error)
    if not isinstance(error, RuntimeError) or not (from_store or any(sign in str(error) for sign in SIGNS)):
        return None
    advice = RESUMES if can_resume() else BEGINS
    if peers is None:
        return PeerError(
            f"another process of this run is gone, or never came: {str(error).splitlines()[0][:200]}. Its own message "
            f"stands beside this one, unless it was killed. {advice}"
        )
    standing = standing_of_error(error)
    return PeerError(
        f"rank {peers.rank} on {socket.gethostname()} was in step {step + 1} in {standing}: "
        f"{peers.explain(standing.ranks)}. {advice}"
    )
