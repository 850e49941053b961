"""Parsed sources of the repository for the architecture tests; standard library only."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TREES = ("ernie5", "kernels", "tools", "launch", "tests")


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module (absolute dotted name) and the line of the statement; `names` for `from X import names`."""

    module: str
    names: tuple[str, ...]
    line: int


@dataclasses.dataclass(frozen=True)
class Source:
    """One Python file: path relative to the repository, text, syntax tree."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    def at(self, line: int, rule: str) -> str:
        """One complaint: file:line and the broken rule."""
        return f"{self.path}:{line}: {rule}"

    def imports(self) -> Iterator[Import]:
        """Every import at any depth, relative ones resolved to absolute names."""
        package = self.path.removesuffix(".py").split("/")[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, (), node.lineno)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                yield Import(module, tuple(alias.name for alias in node.names), node.lineno)


@functools.cache
def read_sources() -> tuple[Source, ...]:
    paths = [path for tree in TREES for path in sorted((REPOSITORY / tree).rglob("*.py"))]
    return tuple(
        Source(path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
        if "__pycache__" not in path.parts
    )


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    """Every Python file of ernie5/, kernels/, tools/, launch/ and tests/."""
    return read_sources()


@pytest.fixture(scope="session")
def package_sources(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The files of ernie5/ and kernels/, which the fences bind."""
    return tuple(source for source in sources if source.path.startswith(("ernie5/", "kernels/")))


@pytest.fixture
def source_of() -> Callable[[str, str], Source]:
    """A Source that stands in no file: tests of the rules themselves use it."""
    return Source
