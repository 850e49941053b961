"""Each collective's gradient is the adjoint of its forward pass, over three gloo processes and uneven parts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

RANKS = 3


def test_forward_and_gradient_over_three_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    script = Path(__file__).with_name("check_collectives.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **{name: str(value) for name, value in {**shared, "RANK": rank}.items()}},
        )
        for rank in range(RANKS)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
