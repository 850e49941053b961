"""The order of samples, asked for by many workers at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ernie5.data import mixture
from ernie5.data.mixture import SampleOrder, Ticket

SEED = 918273


def test_workers_that_reach_new_epochs_together_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A permutation that is dropped while another worker looks for it ends the run; slow ones make that likely."""
    busy, most, guard = 0, 0, threading.Lock()
    original = mixture.permutation_of

    def slow(count: int, *parts: int | str) -> np.ndarray:
        nonlocal busy, most
        if SEED not in parts:  # a loader that another test left behind may still be at work
            return original(count, *parts)
        with guard:
            busy += 1
            most = max(most, busy)
        time.sleep(0.005)
        with guard:
            busy -= 1
        return original(count, *parts)

    monkeypatch.setattr(mixture, "permutation_of", slow)
    order = SampleOrder({"text": 1}, seed=SEED, streams=4)

    def walk(stream: int) -> list[int]:
        return [order.place(Ticket("text", index), stream=stream).epoch for index in range(10)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(walk, range(4)))
    assert found == [[4 * index + stream for index in range(10)] for stream in range(4)]
    assert most == 1
