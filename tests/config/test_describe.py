"""The printed tree is readable, complete, and YAML itself."""

from __future__ import annotations

from collections.abc import Callable

from ernie5.config.describe import describe_fields, describe_text
from ernie5.config.load import load_config

GOLDEN = """\
steps: 3                                      # [performance] length of the run (steps); required
title: 'x'                                    # [logging] a title
mode: 'fast'                                  # [performance] a mode; one of 'fast', 'slow'
strict: false                                 # [performance] a switch
share: 0.5                                    # [performance] a share
sizes: [4]                                    # [performance] some sizes; default [1, 2]
either: 'none'                                # [performance] one or several
experts:
  count: 9                                    # [architecture] routed experts (experts); default 64
  top_k: 8                                    # [architecture] chosen experts
  balance:
    speed: 0.5                                # [numerics] step of the bias
stages: []                                    # [performance] stages
"""


def test_the_tree_matches_its_golden_text(write: Callable, schema: type) -> None:
    loaded = load_config(write("steps: 3\nsizes: [4]\nexperts: {count: 9}\n"), schema=schema)
    assert describe_text(loaded, with_places=False) == GOLDEN


def test_the_printed_tree_loads_back_to_the_same_config(write: Callable, schema: type) -> None:
    loaded = load_config(write("steps: 3\nexperts: {balance: {speed: 7}}\n"), schema=schema, overrides=("share=0",))
    assert load_config(write(describe_text(loaded), "again.yaml"), schema=schema) == loaded


def test_places_name_file_line_and_override(write: Callable, schema: type) -> None:
    path = write("steps: 3\nexperts:\n  count: 9\n")
    text = describe_text(load_config(path, schema=schema, overrides=("title=t",)))
    assert f"set in {path}:3" in text and "set in override title=t" in text
    leaves = {leaf.path: leaf for leaf in describe_fields(load_config(path, schema=schema))}
    assert leaves["experts.count"].plain()["default"] == 64
    assert leaves["steps"].plain()["required"] is True
    assert leaves["title"].place == ""
