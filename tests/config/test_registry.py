"""The static table names things that exist."""

from __future__ import annotations

import pytest

from ernie5.config.registry import TABLES, names, resolve, target
from ernie5.errors import ConfigError


def test_every_root_schema_resolves_to_a_class() -> None:
    for name in names("root"):
        assert isinstance(resolve("root", name=name), type)


def test_every_target_has_the_form_module_colon_name() -> None:
    for table in TABLES:
        for name in names(table):
            module, _, attribute = target(table, name=name).partition(":")
            assert module.startswith("ernie5.") and attribute.isidentifier()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="local, grid, deepspeed"):
        target("engine", name="jax")
