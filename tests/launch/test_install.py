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


def test_the_quickstart_refuses_words_it_does_not_know_before_installing(repository: Path) -> None:
    script = repository / "launch" / "quickstart.sh"
    done = subprocess.run(["bash", str(script), "--fast"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "'--fast'" in done.stderr
    done = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--from-scratch" in done.stdout
