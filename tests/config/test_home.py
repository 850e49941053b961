"""`~` at the start of a path in a file, an override or an argument is the home folder, expanded where it is read."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ernie5.config.arguments import CommandParser
from ernie5.config.base import Config, config, element_of, hints_of, info_of, is_config, options
from ernie5.config.field import field
from ernie5.config.home import in_home
from ernie5.config.load import config_to_dict, load_config
from ernie5.config.registry import TABLES
from ernie5.errors import ConfigError


@config
class Places(Config):
    folder: str | None = field(None, doc="a folder", is_path=True)
    shards: tuple[str, ...] = field((), doc="some files", is_path=True)
    title: str = field("x", doc="a title")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


def test_files_and_overrides_are_read_with_the_home_folder_in_place(write: Callable, home: str) -> None:
    path = write("folder: ~/runs/one\nshards: [~/a*.tar, b~.tar, sample, ./~/c]\ntitle: ~/no path\n")
    loaded = load_config(path, schema=Places)
    assert config_to_dict(loaded) == {
        "folder": f"{home}/runs/one", "shards": [f"{home}/a*.tar", "b~.tar", "sample", "./~/c"], "title": "~/no path"
    }
    assert load_config(path, schema=Places, overrides=["folder=~/two"]).folder == f"{home}/two"
    assert load_config(path, schema=Places, overrides=["folder=~"]).folder is None, "YAML's null"
    assert load_config(path, schema=Places, overrides=["folder='~'"]).folder == home


def test_a_base_may_lie_in_the_home_folder(write: Callable, home: str) -> None:
    write("folder: there\n", "home/low.yaml")
    assert load_config(write("base: ~/low.yaml\n"), schema=Places).folder == "there"


def test_the_home_folder_of_nobody_is_an_error_with_its_line(write: Callable) -> None:
    with pytest.raises(ConfigError, match=r"^shards\[1\] = '~nobody-here/x'.*~nobody-here\. .*run\.yaml:3\)$"):
        load_config(write("shards:\n- a\n- ~nobody-here/x\n"), schema=Places)


def test_an_empty_path_is_refused_not_taken_for_the_working_directory(write: Callable) -> None:
    with pytest.raises(ConfigError, match=r"folder = '': must not be empty\. a folder\. .*run\.yaml:1\)$"):
        load_config(write("folder: ''\n"), schema=Places)
    with pytest.raises(ConfigError, match=r"shards.*must not be empty"):
        load_config(write("shards: [a, '']\n"), schema=Places)


def test_arguments_that_are_paths_are_expanded_however_they_are_written(home: str) -> None:
    parser = CommandParser(prog="ernie5 look")
    parser.add_argument("place", type=in_home)
    parser.add_argument("--out", type=Path)
    below = parser.add_subparsers().add_parser("deep")
    below.add_argument("--more", type=Path)
    options = parser.parse_args(["~/a", "--out=~/b", "deep", "--more", "~/c"])
    assert (options.place, options.out, options.more) == (f"{home}/a", Path(home, "b"), Path(home, "c"))


def texts(schema: type[Config], *, prefix: str = "") -> Iterator[tuple[str, type[Config], str]]:
    for name, hint in hints_of(schema).items():
        for option in options(hint):
            inner = element_of(option) or option
            if is_config(inner):
                yield from texts(inner, prefix=f"{prefix}{name}.")
            elif inner is str:
                yield prefix + name, schema, name


def test_every_setting_that_speaks_of_a_folder_or_a_path_is_declared_as_one() -> None:
    speaking, declared = set(), set()
    for target in TABLES["root"].values():
        module, name = target.split(":")
        for path, schema, key in texts(vars(importlib.import_module(module))[name]):
            info = info_of(schema, key)
            if re.search(r"\b(paths?|folder|directory|checkpoint whose)\b", info.doc) and not info.choices:
                speaking.add(path)
            if info.is_path:
                declared.add(path)
    assert speaking == declared and len(declared) >= 10
