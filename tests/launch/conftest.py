"""Fixtures of the launchers' tests."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def load_supervision(repository: Path) -> Callable[[str], types.ModuleType]:
    """load_supervision(name): the module launch/supervision/NAME.py, which is not installed."""

    def load(name: str) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(name, repository / "launch" / "supervision" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up by name
        spec.loader.exec_module(module)
        return module

    return load
