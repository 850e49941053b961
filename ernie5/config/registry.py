"""The static table from names in YAML to Python objects. YAML never names Python; this file does, once.

The targets are texts, imported on first use, so that reading a config costs neither torch nor an engine.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Mapping

from ernie5.errors import ConfigError

TABLES: Mapping[str, Mapping[str, str]] = types.MappingProxyType(
    {
        "root": types.MappingProxyType(
            {
                "train": "ernie5.train.config:RootConfig",
                "tokenizer": "ernie5.tokenizers.config:TokenizerRunConfig",
            }
        ),
        "engine": types.MappingProxyType(
            {
                "local": "ernie5.engine.local:LocalEngine",
                "grid": "ernie5.engine.grid:GridEngine",
                "deepspeed": "ernie5.engine.deepspeed_engine:DeepSpeedEngine",
            }
        ),
    }
)


def names(table: str) -> tuple[str, ...]:
    """The names that a table knows."""
    return tuple(TABLES[table])


def target(table: str, *, name: str) -> str:
    """The "module:Class" of a name. Raises ConfigError for an unknown one."""
    if name not in TABLES[table]:
        raise ConfigError(f"{table} {name!r} is unknown. Known: {', '.join(TABLES[table])}.")
    return TABLES[table][name]


def resolve(table: str, *, name: str) -> object:
    """Import and return the object behind a name. Raises ConfigError for an unknown one."""
    module, attribute = target(table, name=name).split(":")
    return vars(importlib.import_module(module))[attribute]
