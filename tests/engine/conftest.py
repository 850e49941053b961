"""Fixtures of the engines' tests."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def tiny() -> types.ModuleType:
    """The module that builds tiny engines."""
    spec = importlib.util.spec_from_file_location("tiny_run", Path(__file__).parent / "tiny_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module
