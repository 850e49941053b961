"""Declarations that could not be loaded or documented are refused when the class is made."""

from __future__ import annotations

import pytest

from ernie5.config import field as checks
from ernie5.config.base import Config, config, hints_of
from ernie5.config.field import field


@config
class WithDict(Config):
    table: dict[str, int] | None = field(None, doc="not supported")


@config
class WithList(Config):
    values: list[int] = field((), doc="not supported")


def test_a_field_needs_a_doc_and_a_known_kind() -> None:
    with pytest.raises(TypeError, match="doc"):
        field(1, doc=" ")
    with pytest.raises(TypeError, match="kind"):
        field(1, doc="x", kind="magic")


def test_a_plain_dataclass_field_is_refused() -> None:
    with pytest.raises(TypeError, match="declare it with field"):

        @config
        class Plain(Config):
            value: int = 3


@pytest.mark.parametrize("schema", [WithDict, WithList])
def test_types_that_yaml_cannot_fill_are_refused(schema: type) -> None:
    with pytest.raises(TypeError, match="not supported"):
        hints_of(schema)


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.positive, (1, 0.1), (0, -1, float("nan"))),
        (checks.non_negative, (0, 2), (-0.1, float("nan"))),
        (checks.fraction, (0, 0.5, 1), (-0.1, 1.1, float("nan"))),
        (checks.below_one, (0, 0.5, 0.9999), (-0.1, 1, 1.1, float("nan"))),
        (checks.at_least(8), (8, 9), (7,)),
        (checks.between(2, 4), (2, 4), (1, 5, float("nan"))),
        (checks.multiple_of(8), (8, 64), (0, 12, -8)),
        (checks.one_of("a", 2), ("a", 2), ("b", 3)),
        (checks.non_empty, ("a",), ("", "  ")),
    ],
)
def test_a_check_gives_none_for_good_values_and_a_rule_for_bad_ones(check: object, good: tuple, bad: tuple) -> None:
    assert all(check(value) is None for value in good)
    assert all(isinstance(check(value), str) for value in bad)
