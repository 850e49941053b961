"""The last words of agents: those of an earlier attempt end nobody, those of a host that was quicker do."""

from __future__ import annotations

import os
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def endings(load_supervision: Callable[[str], types.ModuleType]) -> types.ModuleType:
    """launch/supervision/endings.py."""
    return load_supervision("endings")


@pytest.fixture
def meet(endings: types.ModuleType, tmp_path: Path):
    """meet(k): the words as agent k of two sees them, from now on."""
    return lambda node, nodes=2: endings.Endings(tmp_path, node_rank=node, nodes=nodes)


def test_a_word_is_seen_by_the_others_and_taken_back_by_the_next_agent_of_that_host(meet, tmp_path: Path) -> None:
    zero, one = meet(0), meet(1)
    assert zero.seen() is None and one.seen() is None
    one.leave(code=4, reason="two\nlines")
    word = zero.seen()
    assert (word.node, word.code, word.reason) == (1, 4, "two lines") and one.seen() is None
    assert f"node 1 ({word.host}) gave up with exit code 4" in str(word)
    meet(1)
    assert zero.seen() is None and not list(tmp_path.glob("agents/*"))


def test_words_that_were_there_before_count_only_while_nobody_comes_to_take_them_back(
    meet, endings: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet(1).leave(code=2, reason="refused")
    meet(5, 6).leave(code=2, reason="of a run with more hosts")
    quick, alone = meet(0), meet(0, 1)
    path = tmp_path / "agents" / "ended-node-1.json"
    old = time.time() - endings.RECENT_SECONDS - 60
    path.with_name("ended-node-2.json").write_text("{")  # half a word is none
    assert quick.seen() is None
    now = time.monotonic()
    monkeypatch.setattr(endings.time, "monotonic", lambda: now + endings.COMING_SECONDS + 1)
    assert quick.seen().node == 1 and alone.seen() is None
    os.utime(path, (old, old))
    late = meet(0)
    monkeypatch.setattr(endings.time, "monotonic", lambda: now + 3 * endings.COMING_SECONDS)
    assert late.seen() is None
