"""From the unchecked tree to a Config: unknown keys, missing keys, types; every error with its place."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator

from ernie5.config.base import Config, Origin, Place, element_of, hints_of, info_of, is_config, options, type_text
from ernie5.config.field import REQUIRED
from ernie5.config.home import in_home
from ernie5.config.node import Node
from ernie5.errors import ConfigError

C = typing.TypeVar("C", bound=Config)
LARGEST_EXACT_FLOAT = 2**53


def build_config(root: Node, *, schema: type[C]) -> C:
    """Check `root` against `schema`. Raises ConfigError naming key, value, rule and place."""
    places: dict[str, Place] = {"": root.place}
    _collect_places(root, path="", places=places)
    return _Builder(schema, types.MappingProxyType(places)).section(schema, root, path="")


def schema_paths(schema: type[Config], *, prefix: str = "") -> Iterator[str]:
    """Every dotted path that `schema` accepts, sections included."""
    for name, hint in hints_of(schema).items():
        yield prefix + name
        for option in options(hint):
            inner = element_of(option) or option
            if is_config(inner):
                yield from schema_paths(inner, prefix=f"{prefix}{name}.")


class _Builder:
    """Builds nested sections inside out, so that `validate` of a section sees valid children."""

    def __init__(self, root_schema: type[Config], places: types.MappingProxyType[str, Place]) -> None:
        self.root_schema = root_schema
        self.places = places

    def section(self, schema: type[C], node: Node, *, path: str, default: Config | None = None) -> C:
        """One Config from a mapping (or null: all defaults); `default` gives the values of keys left out."""
        if not (node.is_mapping or node.value is None):
            raise ConfigError(
                f"{path or 'the file'} = {node.show()}: expected a section with the keys "
                f"{', '.join(hints_of(schema))} ({node.place})"
            )
        for entry in node.entries():
            if entry.key not in hints_of(schema):
                self._unknown(schema, entry.key, entry.place, path=path)
        values = {
            name: self._value(schema, name, node, path=path, default=default) for name in hints_of(schema)
        }
        instance = schema.__new__(schema)
        object.__setattr__(instance, "_origin", Origin(path, self.places))
        instance.__init__(**values)
        return instance

    def _value(self, schema: type[Config], name: str, parent: Node, *, path: str, default: Config | None) -> object:
        hint, info = hints_of(schema)[name], info_of(schema, name)
        node, full = parent.get(name), f"{path}.{name}" if path else name
        below = info.default if default is None else vars(default)[name]
        if node is not None:
            return self._convert(_in_home(node, full) if info.is_path else node, hint, full, below)
        if isinstance(below, Config) or is_config(below):
            inner = below if isinstance(below, Config) else None
            return self.section(type(below) if inner else below, Node(None, parent.place), path=full, default=inner)
        if below is not REQUIRED:
            return below
        if is_config(hint):
            return self.section(hint, Node(None, parent.place), path=full)
        raise ConfigError(
            f"{full} is missing. It needs {type_text(hint)}: {info.doc}{self._fragment_hint(full)} ({parent.place})"
        )

    def _fragment_hint(self, path: str) -> str:
        """What to do with a file that lacks a whole section: it is likely one of the fragments."""
        section = path.split(".")[0]
        if section in self.places or section == path:
            return ""
        return (
            f". There is no section `{section}`: files of configs/model, configs/data and configs/recipe are fragments "
            "that a whole configuration names in `base:` (see configs/pretrain)"
        )

    def _convert(self, node: Node, hint: object, path: str, default: object) -> object:
        for option in options(hint):
            if is_config(option) and node.is_mapping:
                return self.section(option, node, path=path, default=default if isinstance(default, option) else None)
            if is_config(option) and node.value is None and type(None) not in options(hint):
                return self.section(option, node, path=path, default=default if isinstance(default, option) else None)
            element = element_of(option)
            if element is not None and node.is_list:
                return tuple(self._convert(item, element, f"{path}[{i}]", None) for i, item in enumerate(node.items()))
            if not node.is_mapping and not node.is_list and option in (bool, int, float, str, type(None)):
                matches, value = _scalar(node.value, option)
                if matches:
                    return value
        raise ConfigError(f"{path} = {node.show()}: expected {type_text(hint)}{_hint(node, hint)} ({node.place})")

    def _unknown(self, schema: type[Config], key: str, place: Place, *, path: str) -> typing.NoReturn:
        import difflib  # slow to import and needed on errors alone

        full = f"{path}.{key}" if path else key
        close = difflib.get_close_matches(key, list(hints_of(schema)), n=1, cutoff=0.6)
        elsewhere = [p for p in schema_paths(self.root_schema) if p.rsplit(".", 1)[-1] == key]
        if close and not elsewhere:
            advice = f"Did you mean {path + '.' if path else ''}{close[0]}?"
        elif elsewhere:
            advice = f"Did you mean {' or '.join(elsewhere[:3])}?"
        else:
            advice = f"Known keys here: {', '.join(hints_of(schema))}."
        raise ConfigError(f"{full}: unknown key. {advice} ({place})")


def _collect_places(node: Node, *, path: str, places: dict[str, Place]) -> None:
    for entry in node.entries():
        full = f"{path}.{entry.key}" if path else entry.key
        places[full] = entry.place
        _collect_places(entry.node, path=full, places=places)
    for i, item in enumerate(node.items()):
        places[f"{path}[{i}]"] = item.place
        _collect_places(item, path=f"{path}[{i}]", places=places)


def _in_home(node: Node, path: str) -> Node:
    """The path, or the list of them, with the home folder in the place of a leading `~`."""
    if node.is_list:
        items = tuple(_in_home(item, f"{path}[{i}]") for i, item in enumerate(node.items()))
        return dataclasses.replace(node, value=items)
    if not isinstance(node.value, str):
        return node
    try:
        return dataclasses.replace(node, value=in_home(node.value))
    except ConfigError as error:
        raise ConfigError(f"{path} = {error} ({node.place})") from None


def _scalar(value: object, option: object) -> tuple[bool, object]:
    """(fits, converted): whole floats such as 1e6 are whole numbers, whole numbers are numbers, nothing else bends."""
    if option is type(None):
        return value is None, None
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if option is int and isinstance(value, float) and abs(value) < LARGEST_EXACT_FLOAT and value.is_integer():
        return True, int(value)
    if option is int and isinstance(value, bool):
        return False, None
    return isinstance(value, option), value


def _hint(node: Node, hint: object) -> str:
    wants = options(hint)
    if any(element_of(option) is not None for option in wants) and not node.is_mapping:
        return f", write [{node.show()}]"
    if str in wants and isinstance(node.value, (bool, int, float)):
        return f", write '{node.show()}' in quotes"
    if bool in wants and str(node.value).lower() in ("yes", "no", "on", "off"):
        return " (YAML 1.2 has no yes, no, on, off)"
    if int in wants and isinstance(node.value, float):
        return ", this one has a fractional part or is too large"
    return ""

