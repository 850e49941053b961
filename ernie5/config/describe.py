"""A resolved config for people (text) and for programs (plain values); both in order of declaration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ernie5.config.base import Config, hints_of, info_of, show, type_text
from ernie5.config.field import REQUIRED

INDENT = "  "
DOC_COLUMN = 44


@dataclasses.dataclass(frozen=True)
class FieldDescription:
    """One leaf of the tree. default is REQUIRED where there is none; place is "" for a value nobody wrote."""

    path: str
    value: object
    default: object
    type: str
    unit: str
    kind: str
    doc: str
    choices: tuple[bool | int | float | str, ...]
    place: str

    def plain(self) -> dict[str, object]:
        """JSON-able form."""
        result = dataclasses.asdict(self)
        result["default"] = None if self.default is REQUIRED else _listed(self.default)
        result["required"] = self.default is REQUIRED
        result["value"] = _listed(self.value)
        result["choices"] = list(self.choices)
        return result


def describe_fields(config: Config, *, path: str = "", default: Config | None = None) -> Iterator[FieldDescription]:
    """Every leaf of a config, depth first. `default` is the instance that a parent field declares as its default."""
    for name, hint in hints_of(type(config)).items():
        value, info, full = vars(config)[name], info_of(type(config), name), f"{path}.{name}" if path else name
        declared = info.default if default is None else vars(default)[name]
        if isinstance(value, Config):
            inner = declared if isinstance(declared, type(value)) else None
            yield from describe_fields(value, path=full, default=inner)
        elif isinstance(value, tuple) and value and isinstance(value[0], Config):
            for i, item in enumerate(value):
                yield from describe_fields(item, path=f"{full}[{i}]")
        else:
            place = config.where(name) if config.was_given(name) else ""
            yield FieldDescription(
                full, value, declared, type_text(hint), info.unit, info.kind, info.doc, info.choices, place
            )


def describe_text(config: Config, *, with_places: bool = True) -> str:
    """The tree as text: `key: value  # [kind] doc; default; where it was set`. It is YAML, lists of sections aside."""
    lines: list[str] = []
    open_sections: tuple[str, ...] = ()
    for leaf in describe_fields(config):
        *sections, name = leaf.path.split(".")
        for depth, section in enumerate(sections):
            if tuple(sections[: depth + 1]) != open_sections[: depth + 1]:
                lines.append(f"{INDENT * depth}{section}:")
        open_sections = tuple(sections)
        text = f"{INDENT * len(sections)}{name}: {show(leaf.value)}"
        lines.append(f"{text:<{DOC_COLUMN}}  # {_remark(leaf, with_places=with_places)}")
    return "\n".join(lines) + "\n"


def _remark(leaf: FieldDescription, *, with_places: bool) -> str:
    parts = [f"[{leaf.kind}] {leaf.doc}{f' ({leaf.unit})' if leaf.unit else ''}"]
    if leaf.choices:
        parts.append("one of " + ", ".join(show(choice) for choice in leaf.choices))
    if leaf.default is REQUIRED:
        parts.append("required")
    elif leaf.default != leaf.value:
        parts.append(f"default {show(leaf.default)}")
    if with_places and leaf.place:
        parts.append(f"set in {leaf.place}")
    return "; ".join(parts)


def _listed(value: object) -> object:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
