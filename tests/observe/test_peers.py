"""Ranks that answer, are stopped, have ended or cannot be reached, each told apart over real sockets."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ernie5.observe.peers import Answer, Listener, Peer, Peers, Presence
from ernie5.observe.standing import list_ranks, standing_of_error, standing_of_thread

NOBODY = "192.0.2.1"  # TEST-NET-1 (RFC 5737): no machine has this address
OTHER = """
import json, sys, time
from ernie5.observe.peers import Listener
listener = Listener(1, master="127.0.0.1", standing=lambda: "barrier in ernie5/there.py:1 (wait)")
print(json.dumps(vars(listener.peer)), flush=True)
time.sleep(600)
"""


@pytest.fixture
def company():
    """company(peers...) -> Peers of rank 0; what it opened is closed."""
    listener = Listener(0, master="127.0.0.1", standing=lambda: "here")

    def make(*others: Peer) -> Peers:
        return Peers(listener, others={peer.rank: peer for peer in others})

    yield make
    listener.close()


@pytest.fixture
def other():
    """A process that listens as rank 1, and its Peer."""
    process = subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True)
    yield process, Peer(**json.loads(process.stdout.readline()))
    process.kill()
    process.wait()


def ask_until(peers: Peers, *, presence: Presence) -> Answer:
    """The first answer of rank 1 with this presence; a busy machine may keep it waiting."""
    deadline = time.monotonic() + 60.0
    while (answer := peers.ask((1,))[1]).presence != presence:
        assert time.monotonic() < deadline, answer
    return answer


def test_a_rank_answers_is_stopped_ends_and_its_port_goes_to_a_stranger(company, other) -> None:
    process, peer = other
    peers = company(peer)
    assert ask_until(peers, presence=Presence.ANSWERS).standing == "barrier in ernie5/there.py:1 (wait)"
    assert "rank 1 in barrier in ernie5/there.py:1 (wait)" in peers.explain((0, 1))
    os.kill(process.pid, signal.SIGSTOP)
    assert peers.ask((1,))[1].presence == Presence.SILENT
    assert peers.is_reachable(peer)  # slow is not lost
    process.kill()
    process.wait()
    assert peers.ask((1,))[1].presence == Presence.ENDED
    assert peers.explain((0, 1)) == f"rank 1 on {peer.host} (127.0.0.1) has ended"
    stranger = Listener(1, master="127.0.0.1", standing=lambda: "elsewhere")
    mistaken = dataclasses.replace(stranger.peer, token=peer.token)
    assert company(mistaken).ask((1,))[1].presence == Presence.ENDED
    stranger.close()


def test_a_machine_that_nobody_answers_for_is_unreachable_and_named_first(
    company, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        if address[0] == NOBODY:
            raise TimeoutError(f"no answer within {timeout} s")
        return whole(address, timeout=timeout)

    whole = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", connect)
    gone = Peer(2, "node2", NOBODY, 9, "x")
    ended = Peer(1, "node1", "127.0.0.1", free_port(), "x")
    peers = company(ended, gone)
    assert peers.explain((0, 1)) == "rank 1 on node1 (127.0.0.1) has ended"
    assert "rank 2 on node2 (192.0.2.1) is unreachable" in peers.explain(())
    assert peers.neighbour == ended and not peers.is_reachable(gone) and peers.is_reachable(ended)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_ranks_on_this_machine_alone_have_no_neighbour_to_look_after(company, other) -> None:
    assert company(other[1]).neighbour is None


def test_a_failed_collective_says_its_name_its_ranks_and_who_of_ours_called_it() -> None:
    import torch
    import torch.distributed as dist

    ours = {"__name__": "ernie5.parallel.made_up", "dist": dist, "torch": torch}
    exec("def send():\n    dist.all_gather_into_tensor(torch.zeros(3), torch.zeros(2))\n", ours)
    is_first = not dist.is_initialized()  # DeepSpeed's tests leave their group of one behind
    if is_first:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError) as caught:
            ours["send"]()
        standing = standing_of_error(caught.value)
    finally:
        if is_first:
            dist.destroy_process_group()
    assert str(standing) == "all_gather_into_tensor over ranks 0 in ernie5/parallel/made_up.py:2 (send)"


def test_a_wait_for_a_collective_that_was_begun_before_is_named_by_our_function() -> None:
    class Axis:
        ranks = (2, 3)

    ours = {"__name__": "ernie5.parallel.collectives"}
    exec("def finish_exchange(work, axis):\n    raise RuntimeError('Connection closed by peer')\n", ours)
    with pytest.raises(RuntimeError) as caught:
        ours["finish_exchange"](None, Axis)
    named = "finish_exchange over ranks 2-3 in ernie5/parallel/collectives.py:2 (finish_exchange)"
    assert str(standing_of_error(caught.value)) == named


def test_a_thread_outside_of_collectives_says_where_it_is() -> None:
    ours = {"__name__": "ernie5.data.made_up", "event": threading.Event(), "started": threading.Event()}
    exec("def read():\n    started.set()\n    event.wait(60)\n", ours)
    thread = threading.Thread(target=ours["read"], daemon=True)
    thread.start()
    ours["started"].wait()
    assert str(standing_of_thread(thread.ident)) == "ernie5/data/made_up.py:3 (read)"
    ours["event"].set()
    assert str(standing_of_error(ValueError("never raised"))) == "an unknown place"


def test_runs_of_ranks_are_listed_short() -> None:
    assert list_ranks([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"
