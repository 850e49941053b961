"""The layout table's modules stand beside its tests; rows run in jobs of several, when a test first asks for one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from layout_jobs import Layouts
from layout_rows import LONG_STEPS, STEPS


def _layouts(request: pytest.FixtureRequest, factory: pytest.TempPathFactory, *, steps: int) -> Layouts:
    """Rows that the selected tests name."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [params["row"] for params in calls if "row" in params and hasattr(params["row"], "yardstick")]
    return Layouts(factory.mktemp(f"layouts-{steps}"), wanted=wanted, steps=steps)


@pytest.fixture(scope="session")
def layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """Rows of two steps."""
    return _layouts(request, tmp_path_factory, steps=STEPS)


@pytest.fixture(scope="session")
def long_layouts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """Rows of twenty steps, which replay the choices of their yardsticks."""
    return _layouts(request, tmp_path_factory, steps=LONG_STEPS)


WORKER = Path(__file__).with_name("worker.py")
LIMIT_SECONDS = 540.0
# sums of fp32 numbers in another order, relative to the largest gradient of the tensor
GRADIENT_TOLERANCE = 1e-5
# two AdamW steps divide by sqrt(v): rounding of a tiny gradient moves a weight by a part of the step
PARAMETER_TOLERANCE = 1e-3
# normed hidden states of order one, out of weights that differ by that
HIDDEN_TOLERANCE = 1e-3


@pytest.fixture(scope="session")
def run_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, dict]]:
    """`run_rows(rows, ranks=2)` -> what rank 0 saw of each row, by name."""

    def run(rows: list[dict], *, ranks: int) -> dict[str, dict]:
        folder = tmp_path_factory.mktemp("layouts")
        job = folder / "job.json"
        job.write_text(json.dumps({"rows": rows, "out": str(folder)}), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            own = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            with log.open("wb") as out:
                processes.append(subprocess.Popen(
                    [sys.executable, str(WORKER), str(job)], env={**os.environ, **own}, stdout=out, stderr=out
                ))
        _wait(processes)
        texts = [log.read_text(encoding="utf-8", errors="replace")[-3000:] for log in logs]
        assert all(process.returncode == 0 for process in processes), "\n".join(texts)
        return {row["name"]: torch.load(folder / f"{row['name']}.pt", weights_only=False) for row in rows}

    return run


def _wait(processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)


@pytest.fixture(scope="session")
def check_row() -> Callable[..., None]:
    """`check_row(result, expected=local)`: losses, loads, norm, every gradient by name, parameters, bias."""

    def check(
        result: dict,
        *,
        expected: dict,
        gradient_tolerance: float = GRADIENT_TOLERANCE,
        parameter_tolerance: float = PARAMETER_TOLERANCE,
        hidden_tolerance: float = HIDDEN_TOLERANCE,
    ) -> None:
        for step, losses in enumerate(expected["losses"]):
            assert result["losses"][step] == pytest.approx(losses, rel=1e-5), f"losses of step {step}"
            assert torch.equal(result["loads"][step], expected["loads"][step]), f"loads of step {step}"
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
        assert set(result["gradients"]) == set(expected["gradients"])
        for name, gradient in expected["gradients"].items():
            allowed = gradient_tolerance * gradient.abs().max()
            assert (result["gradients"][name] - gradient).abs().max() <= allowed, f"gradient of {name}"
        for name, value in expected["state"].parameters.items():
            moved = (value - expected["start"][name]).norm()
            difference = (result["state"].parameters[name] - value).norm()
            assert difference <= parameter_tolerance * moved, f"{name}: {difference:.1e} of {moved:.1e}"
        for name, value in expected["state"].buffers.items():
            assert torch.equal(result["state"].buffers[name], value), name
        assert torch.allclose(result["by_hand"], expected["by_hand"], atol=hidden_tolerance)
        assert set(result["state"].moments) == set(expected["state"].moments)

    return check
