"""Command lines: complaints are one line, options carry the documentation of the setting that they replace."""

from __future__ import annotations

import pytest

from ernie5.config.arguments import CommandParser, add_overrides, add_setting, replace_settings
from ernie5.config.base import Config, config
from ernie5.config.field import field, positive
from ernie5.errors import ConfigError


@config
class Speech(Config):
    frames: int = field(75, doc="longest speech, 100 % of it", check=positive)


def make_parser() -> CommandParser:
    parser = CommandParser(prog="ernie5 speak")
    parser.add_argument("file")
    add_overrides(parser)
    add_setting(parser, "max-frames", schema=Speech, field="frames", kind=int, section="speech")
    return parser


def test_a_complaint_is_one_line_that_names_what_is_missing_and_where_help_is() -> None:
    with pytest.raises(ConfigError) as caught:
        make_parser().parse_intermixed_args([])
    message = str(caught.value)
    assert "required: file." in message and "a.b=c" not in message, "settings are not required"
    assert "`ernie5 speak --help`" in message and "\n" not in message


def test_an_option_explains_the_setting_it_replaces() -> None:
    text = " ".join(make_parser().format_help().split())
    assert "longest speech, 100 % of it (default: speech.frames of the run)" in text


def test_a_replaced_value_is_named_by_its_key_not_by_its_class() -> None:
    assert replace_settings(Speech(), changes={"frames": 3}, section="speech") == Speech(frames=3)
    with pytest.raises(ConfigError, match=r"^speech\.frames = 0: must be positive"):
        replace_settings(Speech(), changes={"frames": 0}, section="speech")
