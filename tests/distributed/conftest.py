"""The layout table's modules stand beside its tests; rows run in jobs of several, when a test first asks for one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
