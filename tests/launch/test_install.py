"""The installation says what is missing before it changes anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

NEEDED = ("bash", "env", "dirname", "cat", "cksum", "grep")


@pytest.fixture
def install(tmp_path: Path, repository: Path) -> Callable[[dict[str, str]], subprocess.CompletedProcess]:
    """install({name: script}) runs a copy of install.sh where only those programs and the shell's own exist."""
    root, programs = tmp_path / "root", tmp_path / "bin"
    (root / "launch").mkdir(parents=True)
    programs.mkdir()
    shutil.copy(repository / "launch" / "install.sh", root / "launch")
    shutil.copy(repository / "setup.py", root)
    for name in NEEDED:
        (programs / name).symlink_to(shutil.which(name))

    def run(scripts: dict[str, str]) -> subprocess.CompletedProcess:
        for name, script in scripts.items():
            (programs / name).write_text(f"#!{programs}/bash\n{script}\n", encoding="utf-8")
            (programs / name).chmod(0o755)
        done = subprocess.run(
            [str(programs / "bash"), str(root / "launch" / "install.sh")],
            env={"PATH": str(programs)}, capture_output=True, text=True, timeout=60,
        )
        assert not (root / ".venv").exists()
        return done

    return run


def python_that_fails_when(word: str) -> str:
    """A python3 that is the real one, except that code containing `word` fails."""
    return f'case "$*" in *{word}*) exit 1 ;; esac\nexec {sys.executable} "$@"'


@pytest.mark.parametrize(
    ("scripts", "what", "package"),
    [
        ({}, "Python 3.11 or newer", "python3.11"),
        ({"python3": python_that_fails_when("version_info")}, "Python 3.11 or newer", "python3.11"),
        ({"python3": python_that_fails_when("ensurepip")}, "venv module", "-venv"),
        ({"python3": python_that_fails_when("Python.h")}, "Python.h", "-dev"),
        ({"python3": f'exec {sys.executable} "$@"'}, "g++", "g++"),
    ],
)
def test_what_is_missing_is_named_with_its_debian_package(
    install: Callable, scripts: dict[str, str], what: str, package: str
) -> None:
    done = install(scripts)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("EnvironmentFault: ")
    assert what in done.stderr and "apt-get install" in done.stderr and done.stderr.rstrip().endswith(package)


@pytest.mark.parametrize(("has_gpu", "has_cuda", "is_exchanged"), [
    (True, False, True), (True, True, False), (False, False, False),
])
def test_a_torch_without_cuda_is_exchanged_where_there_is_a_gpu(
    tmp_path: Path, repository: Path, has_gpu: bool, has_cuda: bool, is_exchanged: bool
) -> None:
    """The .venv is made of a script that notes what it is called with; its torch is gone once it was uninstalled."""
    root, programs, calls = tmp_path / "root", tmp_path / "bin", tmp_path / "calls"
    for folder in (root / "launch", root / ".venv" / "bin", programs):
        folder.mkdir(parents=True)
    shutil.copy(repository / "launch" / "install.sh", root / "launch")
    shutil.copy(repository / "setup.py", root)
    calls.touch()
    scripts = {
        programs / "nvidia-smi": "echo 'GPU 0: some card'" if has_gpu else "exit 9",
        programs / "g++": "exit 0",
        root / ".venv" / "bin" / "python": f"""echo "$*" >>{calls}
            case "$*" in
              *torch.version.cuda*) exit {int(has_cuda)} ;;
              "-c import torch") ! grep -q uninstall {calls} ;;
            esac""",
    }
    for path, script in scripts.items():
        path.write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", str(root / "launch" / "install.sh")], capture_output=True, text=True, timeout=60,
        env={"PATH": f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    asked = calls.read_text(encoding="utf-8")
    assert ("pip uninstall --quiet --yes torch" in asked) == is_exchanged
    assert ("install --quiet --disable-pip-version-check torch==" in asked) == is_exchanged


def test_the_quickstart_refuses_words_it_does_not_know_before_installing(repository: Path) -> None:
    script = repository / "launch" / "quickstart.sh"
    done = subprocess.run(["bash", str(script), "--fast"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "'--fast'" in done.stderr
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--from-scratch" in done.stdout
