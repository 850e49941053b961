"""What a rank says when another one is gone is true: with nothing saved, the next start begins at the first step."""

from __future__ import annotations

import socket
import types
from pathlib import Path

import pytest

from ernie5.checkpoint.names import LATEST_FILE
from ernie5.observe import peers as module
from ernie5.train.command import _can_resume
from ernie5.train.lost_peer import as_peer_error, meet_peers

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2100")


def said(folder: Path, *, source: Path | None = None) -> str:
    return str(as_peer_error(LOST, peers=None, can_resume=lambda: _can_resume(folder, source=source)))


def test_a_run_without_a_checkpoint_begins_again_and_one_with_something_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, replica = tmp_path / "run" / "checkpoints", tmp_path / "memory"
    begins = "There is no checkpoint yet: start the run again, and it begins at its first step"
    monkeypatch.delenv("ERNIE5_REPLICA", raising=False)
    assert begins in said(checkpoints) and "resume" not in said(checkpoints)
    assert "Start the run again to resume" in said(checkpoints, source=tmp_path / "elsewhere")
    monkeypatch.setenv("ERNIE5_REPLICA", str(replica))
    assert begins in said(checkpoints)
    for folder in (replica, checkpoints):
        whole = folder / "step-00000002"
        whole.mkdir(parents=True)
        assert begins in said(checkpoints), "a checkpoint that was never finished"
        (whole / "manifest.json").write_text("{}", "utf-8")
        (folder / LATEST_FILE).write_text(whole.name, "utf-8")
        assert "Start the run again to resume" in said(checkpoints)
        monkeypatch.delenv("ERNIE5_REPLICA", raising=False)


def test_nobody_looks_for_checkpoints_where_the_error_is_another_one() -> None:
    def refuse() -> bool:
        raise AssertionError("asked")

    assert as_peer_error(RuntimeError("shapes differ"), peers=None, can_resume=refuse) is None


@pytest.mark.parametrize("other,address", [("another-host", "127.0.0.2"), (socket.gethostname(), "127.0.0.1")])
def test_rank_0_listens_where_other_hosts_reach_it_though_its_name_means_loopback_there(
    other: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Debian a host's own name is 127.0.1.1 in its /etc/hosts: asked there, other hosts would ask themselves."""

    class Probe(socket.socket):
        def connect(self, target: tuple[str, int]) -> None:
            self._found = {"head": "127.0.0.1", "192.0.2.1": "10.0.0.9"}[target[0]]

        def getsockname(self) -> tuple[str, int]:
            return (self._found, 1) if self.type == socket.SOCK_DGRAM else super().getsockname()

    def gather(value: dict) -> list[dict]:
        return [value, {**value, "host": other, "rank": 1}]

    create = socket.create_server
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setattr(module.socket, "socket", Probe)
    monkeypatch.setattr(  # this machine has no such address
        module.socket, "create_server",
        lambda place, **options: create((place[0].replace("10.0.0.9", "127.0.0.2"), place[1]), **options),
    )
    peers = meet_peers(types.SimpleNamespace(rank=0, world_size=2, gather=gather))
    assert peers._listener.peer.address == address
    peers.close()
