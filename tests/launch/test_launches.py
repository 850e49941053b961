"""An agent that comes back quickly lets the launchers end that still wait for its dead ranks."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def launches(load_supervision: Callable[[str], types.ModuleType]) -> type:
    return load_supervision("launches").Launches


@pytest.fixture
def begin() -> Callable[[object], contextlib.AbstractContextManager]:
    """Starts an agent's launcher; until the test ends nothing takes its word back, as behind SIGKILL."""
    kept = []

    def start(agent: object) -> contextlib.AbstractContextManager:
        kept.append(agent.running())
        kept[-1].__enter__()
        return kept[-1]

    return start


def test_the_others_launcher_is_waited_for_until_it_ends_or_another_begins(
    launches: type, begin: Callable, tmp_path: Path
) -> None:
    for ends_first in (True, False):
        zero, one = (launches(tmp_path, node_rank=node, nodes=2) for node in (0, 1))
        assert zero.remain() == one.remain() == []  # nobody was cut off
        theirs, _killed = begin(zero), begin(one)
        again = launches(tmp_path, node_rank=1, nodes=2)
        assert again.remain() == ["launch-node-0"] == again.remain()
        if ends_first:
            theirs.__exit__(None, None, None)
        else:
            begin(zero)
            os.utime(tmp_path / "agents" / "launch-node-0", ns=(1, 1))  # another time, however coarse the clock
        assert again.remain() == []
        for path in (tmp_path / "agents").iterdir():
            path.unlink()


def test_hosts_that_were_all_lost_do_not_wait_for_one_another(launches: type, begin: Callable, tmp_path: Path) -> None:
    for node in (0, 1, 2):
        begin(launches(tmp_path, node_rank=node, nodes=3))
    back = [launches(tmp_path, node_rank=node, nodes=3) for node in (0, 1, 2)]
    assert [agent.remain() for agent in back] == [[], [], []]


def test_hosts_that_left_the_run_are_not_waited_for(launches: type, begin: Callable, tmp_path: Path) -> None:
    for node in (0, 1, 2):
        begin(launches(tmp_path, node_rank=node, nodes=3))
    assert launches(tmp_path, node_rank=1, nodes=2).remain() == ["launch-node-0"]
