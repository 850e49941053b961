"""Base class of all configurations: frozen, keyword-only, typed, checked on construction.

    @config
    class MoEConfig(Config):
        num_experts: int = field(64, doc="routed experts per layer", check=positive, kind="architecture")

        def validate(self) -> None:
            if self.top_k > self.num_experts:
                self.fail("top_k", f"more experts per token than num_experts = {self.num_experts}. Lower top_k.")
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import ClassVar, NoReturn

from ernie5.config.field import FieldInfo, field_info
from ernie5.errors import ConfigError

C = typing.TypeVar("C", bound="Config")
SCALARS = (bool, int, float, str)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a value was written: a file with its 1-based line, or (line 0) a command-line override."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclasses.dataclass(frozen=True)
class Origin:
    """Dotted path of one Config inside its root, and the places of the whole root by dotted path."""

    path: str
    places: types.MappingProxyType[str, Place]


class Config:
    """Base of every configuration class; see the module's docstring for the form of a subclass."""

    _origin: ClassVar[Origin] = Origin("", types.MappingProxyType({}))

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            problem = _problem(getattr(self, name), hint, info_of(type(self), name))
            if problem:
                self.fail(name, problem)
        self.validate()

    def __deepcopy__(self, _: dict[int, object]) -> Config:
        """Itself: it is frozen, and modules that hold one are copied (averaged weights)."""
        return self

    def validate(self) -> None:
        """Check rules between fields; call `self.fail` for the key to blame. Nested configs are valid already."""

    def fail(self, key: str, message: str, *, error: type[ConfigError] = ConfigError) -> NoReturn:
        """Raise `error` about `key` (dotted, relative to this config): full path, value, message, (file:line)."""
        full = f"{self._origin.path}.{key}" if self._origin.path else key
        if not self._origin.path and not self._origin.places:
            full = f"{type(self).__name__}.{key}"
        where = self.where(key)
        raise error(f"{full} = {show(self._value(key))}: {message}{f' ({where})' if where else ''}")

    def where(self, key: str = "") -> str:
        """`file:line` of `key`, or of the nearest enclosing key that was written down; "" where nothing is known."""
        parts = [part for part in f"{self._origin.path}.{key}".split(".") if part]
        for length in range(len(parts), -1, -1):
            place = self._origin.places.get(".".join(parts[:length]))
            if place is not None:
                return str(place)
        return ""

    def was_given(self, key: str) -> bool:
        """True when the user wrote `key` (relative to this config) in YAML or as an override."""
        full = f"{self._origin.path}.{key}" if self._origin.path else key
        return full in self._origin.places

    def _value(self, key: str) -> object:
        value: object = self
        for part in key.split("."):
            value = vars(value).get(part) if isinstance(value, Config) else None
        return value


def with_value(given: C, *, key: str, value: object) -> C:
    """`given` with another `value` at the dotted `key`, checked; errors keep naming where settings were written."""
    name, _, below = key.partition(".")
    inner = with_value(vars(given)[name], key=below, value=value) if below else value
    changed = type(given).__new__(type(given))
    object.__setattr__(changed, "_origin", given._origin)
    changed.__init__(**{field: inner if field == name else vars(given)[field] for field in hints_of(type(given))})
    return changed


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[C]) -> type[C]:
    """Make a Config subclass a frozen keyword-only dataclass and refuse declarations that could not be loaded."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    for declared in dataclasses.fields(made):
        if "ernie5" not in declared.metadata:
            raise TypeError(f"{cls.__name__}.{declared.name}: declare it with field(..., doc=...)")
    return made


@functools.cache
def hints_of(cls: type[Config]) -> dict[str, object]:
    """Type of every field by name, in order of declaration. Raises TypeError for a type that YAML cannot fill."""
    hints = typing.get_type_hints(cls)
    result = {declared.name: hints[declared.name] for declared in dataclasses.fields(cls)}
    for name, hint in result.items():
        if not _is_supported(hint):
            raise TypeError(f"{cls.__name__}.{name}: fields of type {hint} are not supported")
    return result


@functools.cache
def info_of(cls: type[Config], name: str) -> FieldInfo:
    """The declaration of field `name`. Raises KeyError where there is none."""
    return {declared.name: field_info(declared) for declared in dataclasses.fields(cls)}[name]


def is_config(hint: object) -> bool:
    """True for a Config subclass, the annotation of a nested configuration."""
    return isinstance(hint, type) and issubclass(hint, Config)


def options(hint: object) -> tuple[object, ...]:
    """The members of a union (`int | None` -> int, NoneType), or the type itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def element_of(hint: object) -> object | None:
    """The element type of `tuple[X, ...]`, None for any other type."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def type_text(hint: object) -> str:
    """A type in the words of an error message: `a whole number`, `a list of texts`, `a whole number or null`."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    plural = {bool: "true or false", int: "whole numbers", float: "numbers", str: "texts"}
    texts = []
    for option in options(hint):
        element = element_of(option)
        if element is not None:
            texts.append(f"a list of {plural.get(element, 'sections')}")
        else:
            texts.append(words.get(option, "a section with keys"))
    return " or ".join(texts)


def show(value: object) -> str:
    """A value as YAML would write it, shortened."""
    if isinstance(value, Config):
        return "{...}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    else:
        text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_supported(hint: object) -> bool:
    for option in options(hint):
        element = element_of(option)
        if element is not None:
            if typing.get_args(option)[1:] != (...,) or not (element in SCALARS or is_config(element)):
                return False
        elif not (option in SCALARS or option is type(None) or is_config(option)):
            return False
    return True


def _problem(value: object, hint: object, info: FieldInfo) -> str | None:
    if not any(_fits(value, option) for option in options(hint)):
        return f"expected {type_text(hint)}, got {type(value).__name__}. {info.doc}."
    for item in value if isinstance(value, tuple) else (value,):
        if item is None or isinstance(item, Config):
            continue
        if info.choices and item not in info.choices:
            return f"must be one of {', '.join(map(show, info.choices))}. {info.doc}."
        rule = info.check(item) if info.check else None
        if rule is None and isinstance(item, float) and not math.isfinite(item):  # .inf, or 1e999
            rule = "must be finite"
        if rule:
            return f"{rule}{f' [{info.unit}]' if info.unit else ''}. {info.doc}."
    return None


def _fits(value: object, option: object) -> bool:
    element = element_of(option)
    if element is not None:
        return isinstance(value, tuple) and all(_fits(item, element) for item in value)
    if option is float:
        return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool))
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, option)
