"""Ranks that wait for one another can be ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

SCRIPT = """
import torch
from ernie5.parallel.state import join_processes
from ernie5.train.recover import StopRequest
with StopRequest():
    print("waits", flush=True)
    join_processes(torch.device("cpu"))
"""


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT), ids=lambda number: number.name)
def test_a_signal_ends_a_rank_whose_rank_0_never_comes(number: signal.Signals) -> None:
    """It only noted the signal, and went on waiting for torch's half an hour."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env={**os.environ, **told}, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "waits\n"
            time.sleep(2)  # until it is in torch
            assert child.poll() is None
            child.send_signal(number)
            assert child.wait(timeout=60) == -number
        finally:
            child.kill()
