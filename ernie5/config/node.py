"""The unchecked tree between YAML and Config: values that remember the file and line they were written in."""

from __future__ import annotations

import dataclasses
import re

from ernie5.config.base import Place
from ernie5.errors import ConfigError

INT = re.compile(r"[-+]?[0-9][0-9_]*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False, ".inf": float("inf"), "-.inf": float("-inf")}
WORDS.update({"Null": None, "True": True, "False": False, "None": None})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One key of a mapping with its value and the place of the key."""

    key: str
    node: Node
    place: Place


@dataclasses.dataclass(frozen=True)
class Node:
    """A scalar, a list (tuple of Node) or a mapping (`mapping` set, value None)."""

    value: object
    place: Place
    mapping: dict[str, Entry] | None = None

    @property
    def is_list(self) -> bool:
        """True for a YAML sequence."""
        return isinstance(self.value, tuple)

    @property
    def is_mapping(self) -> bool:
        """True for a YAML mapping."""
        return self.mapping is not None

    def items(self) -> tuple[Node, ...]:
        """Elements of a list; empty for anything else."""
        return self.value if isinstance(self.value, tuple) else ()

    def entries(self) -> tuple[Entry, ...]:
        """Keys of a mapping in order; empty for anything else."""
        return tuple(self.mapping.values()) if self.mapping is not None else ()

    def get(self, key: str) -> Node | None:
        """The value under `key` of a mapping, None where it is missing."""
        entry = self.mapping.get(key) if self.mapping is not None else None
        return entry.node if entry else None

    def without(self, key: str) -> Node:
        """A copy of a mapping that lacks `key`."""
        return dataclasses.replace(self, mapping={k: e for k, e in (self.mapping or {}).items() if k != key})

    def show(self) -> str:
        """The value for an error message."""
        if self.is_mapping:
            return "{" + ", ".join(self.mapping) + "}"
        if self.is_list:
            return "[" + ", ".join(item.show() for item in self.items()) + "]"
        if self.value is None or isinstance(self.value, bool):
            return {None: "null", True: "true", False: "false"}[self.value]
        return repr(self.value) if isinstance(self.value, str) else str(self.value)


def scalar_value(text: str) -> bool | int | float | str | None:
    """An unquoted scalar by the rules of YAML 1.2: `1e-4` and `1_000` are numbers, `no`, `off`, `1:30` are texts."""
    if text in WORDS:
        return WORDS[text]
    if INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        return float(text)
    return text


def plain_node(value: object, *, source: str) -> Node:
    """A tree made of plain Python values (dict, list or tuple, scalar); every place is `source`."""
    place = Place(source, 0)
    if isinstance(value, dict):
        entries = {str(key): Entry(str(key), plain_node(item, source=source), place) for key, item in value.items()}
        return Node(None, place, entries)
    if isinstance(value, (list, tuple)):
        return Node(tuple(plain_node(item, source=source) for item in value), place)
    return Node(value, place)


def merge_nodes(lower: Node | None, upper: Node) -> Node:
    """Mappings merge key by key, anything else is replaced by `upper`; places follow the values."""
    if lower is None or not (lower.is_mapping and upper.is_mapping):
        return upper
    merged = dict(lower.mapping)
    for entry in upper.entries():
        below = merged.get(entry.key)
        merged[entry.key] = Entry(entry.key, merge_nodes(below.node if below else None, entry.node), entry.place)
    return Node(None, upper.place, merged)


def set_at_path(root: Node, keys: tuple[str, ...], value: Node) -> Node:
    """A copy of `root` with `value` at the dotted path `keys`; missing sections are made.

    Raises ConfigError when the path leads through a list or a scalar.
    """
    if not keys:
        return value
    if root.is_list or not (root.is_mapping or root.value is None):
        raise ConfigError(
            f"{value.place}: cannot set .{'.'.join(keys)} inside {root.show()} ({root.place}), which is not a section. "
            "Override the whole value instead."
        )
    entries = dict(root.mapping or {})
    below = entries[keys[0]].node if keys[0] in entries else Node(None, value.place, {})
    entries[keys[0]] = Entry(keys[0], set_at_path(below, keys[1:], value), value.place)
    return Node(None, root.place, entries)
