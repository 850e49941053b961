"""One configuration field: default or REQUIRED, documentation with its unit, a check, and what it influences.

A check is a function `value -> str | None`: the rule that the value breaks ("must be positive"), or None. Checks are
applied to every element of a tuple and never to None.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

Scalar = bool | int | float | str
Check = Callable[[Scalar], str | None]

KINDS = ("architecture", "numerics", "performance", "logging", "derived")


class _Required(enum.Enum):
    """Type of the REQUIRED marker; an enum so that it survives copy and pickle as the same object."""

    REQUIRED = "required"


REQUIRED = _Required.REQUIRED


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """What a field declares beside its name and type; `default` is REQUIRED where the user must give a value."""

    default: object
    doc: str
    unit: str
    check: Check | None
    kind: str
    choices: tuple[Scalar, ...]
    is_path: bool = False


def field(
    default: object = REQUIRED,
    *,
    doc: str,
    unit: str = "",
    check: Check | None = None,
    kind: str = "performance",
    choices: tuple[Scalar, ...] = (),
    is_path: bool = False,
) -> dataclasses.Field:
    """Declare a field of a `@config` class.

    default: a value, a nested Config (instance or class), or REQUIRED; lists become tuples. kind: architecture
    (changes what the parameters are) | numerics (changes the losses) | performance | logging | derived (computed when
    left out). is_path: a text, or several, in which a leading `~` means the home folder; an empty one, which would be
    the working directory, is refused. Raises TypeError at class creation for an empty doc or an unknown kind: both are
    bugs, not user errors.
    """
    if not doc.strip():
        raise TypeError("a config field needs a doc text")
    if kind not in KINDS:
        raise TypeError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if isinstance(default, list):
        default = tuple(default)
    if is_path and check is None:
        check = non_empty
    info = FieldInfo(default, doc.strip(), unit, check, kind, tuple(choices), is_path)
    metadata = {"ernie5": info}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def field_info(declared: dataclasses.Field) -> FieldInfo:
    """The FieldInfo of a dataclass field made by `field`. Raises KeyError for any other dataclass field."""
    return declared.metadata["ernie5"]


def positive(value: Scalar) -> str | None:
    """Numbers above zero; NaN is refused."""
    return None if value > 0 else "must be positive"


def non_negative(value: Scalar) -> str | None:
    """Numbers from zero on; NaN is refused."""
    return None if value >= 0 else "must be zero or positive"


def fraction(value: Scalar) -> str | None:
    """Numbers in [0, 1]."""
    return None if 0 <= value <= 1 else "must lie between 0 and 1"


def below_one(value: Scalar) -> str | None:
    """Numbers in [0, 1)."""
    return None if 0 <= value < 1 else "must be at least 0 and below 1"


def non_empty(value: Scalar) -> str | None:
    """Strings with at least one visible character."""
    return None if str(value).strip() else "must not be empty"


def at_least(smallest: int | float) -> Check:
    """Numbers >= smallest."""

    def check(value: Scalar) -> str | None:
        return None if value >= smallest else f"must be at least {smallest}"

    return check


def between(smallest: int | float, largest: int | float) -> Check:
    """Numbers in [smallest, largest]."""

    def check(value: Scalar) -> str | None:
        return None if smallest <= value <= largest else f"must lie between {smallest} and {largest}"

    return check


def multiple_of(divisor: int) -> Check:
    """Positive multiples of divisor."""

    def check(value: Scalar) -> str | None:
        return None if value > 0 and value % divisor == 0 else f"must be a positive multiple of {divisor}"

    return check


def one_of(*allowed: Scalar) -> Check:
    """Values out of a fixed list; `choices=` of `field` does the same and is printed by `ernie5 describe`."""

    def check(value: Scalar) -> str | None:
        return None if value in allowed else f"must be one of {', '.join(map(str, allowed))}"

    return check
