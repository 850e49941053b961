"""Fixtures that every test may use; pytest loads this file by itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """What one `ernie5` process left behind."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.hookimpl(trylast=True)  # behind pytest's own selection by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what this machine has no devices for; only asked for when such a test was selected.

    Where none was, GPUs are hidden: the other tests are of the CPU, and their ranks would share one GPU.
    """
    wanted = {name: [item for item in items if item.get_closest_marker(name)] for name in ("gpu", "multi_gpu")}
    if not any(wanted.values()):
        if not any(item.path.name.startswith("check_") for item in items):  # checks of kernels run where they can
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    devices = torch.cuda.device_count()
    for name, needed in (("gpu", 1), ("multi_gpu", 2)):
        for item in wanted[name]:
            if devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), this machine has {devices}"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests and the processes that they start leave the user's cache folder alone; kernels that are compiled there
    (their names hold the hash of their sources) need not be compiled again."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie5"
    cache = tmp_path_factory.mktemp("cache")
    (cache / "ernie5").mkdir()
    for library in users.glob("kernels-*.so"):
        (cache / "ernie5" / library.name).symlink_to(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return REPOSITORY


@pytest.fixture
def run_ernie5(tmp_path: Path) -> Callable[..., CommandResult]:
    """Run `python -m ernie5 ARGUMENTS` in an empty directory, as a user does; returns a CommandResult."""

    def run(*arguments: str | Path, timeout_seconds: float = 300.0, cwd: Path | None = None) -> CommandResult:
        done = subprocess.run(
            [sys.executable, "-m", "ernie5", *map(str, arguments)],
            cwd=cwd or tmp_path, capture_output=True, text=True, timeout=timeout_seconds,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return CommandResult(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def build_tiny_world() -> Callable[..., object]:
    """`build_world(folder, modalities=...)` of tests/support/tiny_world.py: tokenizers, model and corpus in small."""
    return _support("tiny_world").build_world


@pytest.fixture(scope="session")
def other_device() -> types.ModuleType:
    """tests/support/other_device.py: a second device without a GPU, to find where tensors of two devices meet."""
    return _support("other_device")


def _support(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "tests" / "support" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module
