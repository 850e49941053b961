"""YAML to Config and back. The one home of yaml.

Order of precedence: field defaults < files named by `base:` (in order) < the file itself < `a.b=c` overrides.
Scalars follow YAML 1.2 (`1e-4` is a number, `no` is a text), duplicate keys are errors, and nothing is executed.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml

from ernie5.config.base import Config, Place, hints_of
from ernie5.config.build import build_config
from ernie5.config.home import in_home
from ernie5.config.node import Entry, Node, merge_nodes, plain_node, scalar_value, set_at_path
from ernie5.errors import ConfigError

C = typing.TypeVar("C", bound=Config)
WHOLE = re.compile(r"^(train|tokenizer):", re.MULTILINE)  # what tells a run's configuration from a fragment
LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


def load_config(path: str | Path, *, schema: type[C], overrides: Sequence[str] = ()) -> C:
    """Read `path` (and its bases), apply `overrides` such as "model.layers=12", check, and return a frozen `schema`.

    Raises ConfigError naming key, value, rule and file:line.
    """
    root = read_tree(path)
    for text in overrides:
        keys, value = parse_override(text)
        root = set_at_path(root, keys, value)
    return build_config(root, schema=schema)


def load_sections(path: str | Path | None, *, schema: type[C], overrides: Sequence[str] = ()) -> C:
    """Like `load_config`, for a command that needs a few sections of a larger file: keys at the top that `schema` does
    not know are left alone. None: defaults and overrides only.
    """
    root = plain_node({}, source="defaults") if path is None else read_tree(path)
    wanted = hints_of(schema)
    if path is not None and not any(root.get(name) for name in wanted):
        raise ConfigError(f"{path} has none of the sections {', '.join(wanted)}. Give the config of a training run.")
    for entry in root.entries():
        if entry.key not in wanted:
            root = root.without(entry.key)
    for text in overrides:
        keys, value = parse_override(text)
        root = set_at_path(root, keys, value)
    return build_config(root, schema=schema)


def config_from_dict(values: dict[str, object], *, schema: type[C], name: str = "config") -> C:
    """Check nested plain values (as from JSON or a checkpoint) against `schema`; errors name `name` as the source."""
    return build_config(plain_node(values, source=name), schema=schema)


def config_to_dict(config: Config) -> dict[str, object]:
    """Nested plain values (dict, list, scalar), fit for JSON; `config_from_dict` gives back an equal config."""
    return {name: _plain(value) for name, value in vars(config).items() if not name.startswith("_")}


def config_to_yaml(config: Config) -> str:
    """The resolved config as YAML text that `load_config` reads back to an equal config."""
    options = {"sort_keys": False, "allow_unicode": True, "default_flow_style": False, "width": 120}
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, **options)


def peek_keys(path: str | Path) -> tuple[str, ...]:
    """The top-level keys of a YAML file and its bases: tells a pretraining config from a tokenizer config."""
    return tuple(entry.key for entry in read_tree(path).entries())


def read_tree(path: str | Path) -> Node:
    """The merged, unchecked tree of a YAML file. `base:` is a path or a list of paths relative to the file."""
    own = parse_file(Path(path))
    bases = own.get("base")
    if bases is None:
        return own
    merged = None
    for item in bases.items() if bases.is_list else [bases]:
        merged = merge_nodes(merged, _read_base(item, Path(path)))
    return merge_nodes(merged, own.without("base"))


def parse_file(path: Path) -> Node:
    """One YAML file without its bases. Raises ConfigError for a missing file, bad syntax, or a list at the top."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}.{_namesakes(path)}{_neighbours(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a YAML file.{_neighbours(path / 'x')}") from None
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path} is not UTF-8 text (byte {problem.start}): is it a YAML file?") from None
    node = _parse_text(text, str(path), first_line=1)
    if node.value is None and not node.is_mapping:
        return Node(None, Place(str(path), 1), {})
    if not node.is_mapping:
        raise ConfigError(f"expected keys with values at the top level, found {node.show()[:60]} ({node.place})")
    return node


def parse_override(text: str) -> tuple[tuple[str, ...], Node]:
    """Split "a.b=c" into its keys and its value, which is read as YAML. Raises ConfigError for any other form."""
    source = f"override {text}"
    dotted, equals, value = text.partition("=")
    keys = tuple(dotted.strip().split("."))
    if not equals or not all(key and key.replace("_", "a").isalnum() for key in keys):
        raise ConfigError(f"override {text!r} does not have the form section.key=value, for example train.steps=100.")
    if keys == ("base",):
        raise ConfigError("base cannot be overridden on the command line: write a YAML file with that base.")
    return keys, _parse_text(value, source, first_line=0)


def _parse_text(text: str, source: str, *, first_line: int) -> Node:
    try:
        tree = yaml.compose(text, Loader=LOADER)
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line = (mark.line + first_line if first_line else 0) if mark else 0
        what = " ".join(part for part in (problem.context, problem.problem) if part)
        raise ConfigError(
            f"not valid YAML: {what}. Check indentation, colons and quotes there. ({Place(source, line)})"
        ) from None
    except yaml.YAMLError as problem:
        raise ConfigError(f"not valid YAML: {str(problem).splitlines()[0]} ({source})") from None
    if tree is None:
        return Node(None, Place(source, first_line))
    return _convert(tree, source, first_line, active=())


def _convert(node: yaml.Node, source: str, first_line: int, *, active: tuple[int, ...]) -> Node:
    place = Place(source, node.start_mark.line + first_line if first_line else 0)
    if id(node) in active:
        raise ConfigError(f"a YAML alias contains itself ({place})")
    if node.tag.startswith("!") or node.tag.startswith("tag:yaml.org,2002:python"):
        raise ConfigError(f"YAML tag {node.tag} is not allowed: configs hold plain values only. ({place})")
    inside = (*active, id(node))
    if isinstance(node, yaml.SequenceNode):
        return Node(tuple(_convert(item, source, first_line, active=inside) for item in node.value), place)
    if isinstance(node, yaml.ScalarNode):
        return Node(node.value if node.style else scalar_value(node.value), place)
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        key_place = Place(source, key_node.start_mark.line + first_line if first_line else 0)
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key == "<<":
            raise ConfigError(f"keys must be plain words; use `base:` to merge files. ({key_place})")
        if key in entries:
            raise ConfigError(f"{key}: written twice in one section, first at {entries[key].place}. ({key_place})")
        entries[key] = Entry(key, _convert(value_node, source, first_line, active=inside), key_place)
    return Node(None, place, entries)


def _read_base(item: Node, path: Path) -> Node:
    label = f"base = {item.show()}"
    if not isinstance(item.value, str) or not item.value:
        raise ConfigError(f"{label}: expected a path relative to this file, or a list of paths ({item.place})")
    target = Path(os.path.normpath(path.parent / in_home(item.value)))
    if target.resolve() == path.resolve():
        raise ConfigError(f"{label}: a file cannot be its own base ({item.place})")
    if not target.is_file():
        raise ConfigError(f"{label}: there is no file {target}; the path is relative to this file ({item.place})")
    tree = parse_file(target)
    deeper = tree.get("base")
    if deeper is not None:
        raise ConfigError(
            f"{label}: that file has a `base:` itself ({deeper.place}). One level is allowed: "
            f"list all the files here. ({item.place})"
        )
    return tree


def _namesakes(path: Path) -> str:
    """Whole configurations of that name in configs/, here or beside the package, for those who wrote no path."""
    places = [Path("configs"), Path(__file__).resolve().parents[2] / "configs"]
    for folder in places:
        found = sorted(found for found in folder.rglob(f"{path.stem}.yaml") if WHOLE.search(found.read_text("utf-8")))
        if found:
            return f" Did you mean {' or '.join(map(str, found))}?"
    return ""


def _neighbours(path: Path) -> str:
    found = sorted(entry.name for entry in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f" {path.parent} holds: {', '.join(found)}." if found else ""


def _plain(value: object) -> object:
    if isinstance(value, Config):
        return config_to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which would be read back as something else."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    plain = isinstance(scalar_value(value), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else "'")


_Dumper.add_representer(str, _represent_text)
