"""A small schema that uses every supported type, and a writer of YAML files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.config.base import Config, config
from ernie5.config.field import field, fraction, positive
from ernie5.errors import LayoutError


@config
class Balance(Config):
    speed: float | None = field(None, doc="step of the bias", check=positive, kind="numerics")


@config
class Experts(Config):
    count: int = field(64, doc="routed experts", unit="experts", check=positive, kind="architecture")
    top_k: int = field(8, doc="chosen experts", kind="architecture")
    balance: Balance = field(Balance(speed=0.5), doc="load balance")

    def validate(self) -> None:
        if self.top_k > self.count:
            self.fail("top_k", f"exceeds count = {self.count}. Lower it")


@config
class Stage(Config):
    name: str = field(doc="name of the stage")
    rate: float = field(1.0, doc="rate of the stage", check=positive)


@config
class Root(Config):
    steps: int = field(doc="length of the run", unit="steps", check=positive)
    title: str = field("x", doc="a title", kind="logging")
    mode: str = field("fast", doc="a mode", choices=("fast", "slow"))
    strict: bool = field(False, doc="a switch")
    share: float = field(0.5, doc="a share", check=fraction)
    sizes: tuple[int, ...] = field((1, 2), doc="some sizes", check=positive)
    either: tuple[str, ...] | str = field("none", doc="one or several")
    experts: Experts = field(Experts, doc="experts")
    stages: tuple[Stage, ...] = field((), doc="stages")

    def validate(self) -> None:
        if self.steps % self.experts.count and self.strict:
            self.fail("experts.count", f"does not divide steps = {self.steps}", error=LayoutError)


@pytest.fixture
def schema() -> type[Root]:
    return Root


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """write(text, name="run.yaml") -> the path of a file with that text."""

    def writer(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return writer
