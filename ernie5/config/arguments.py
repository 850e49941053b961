"""The command lines of the verbs: argparse whose complaints are one line, and options that stand for settings."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import NoReturn

from ernie5.config.base import Config, info_of
from ernie5.config.home import in_home
from ernie5.errors import ConfigError


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError instead of printing its usage and leaving.

    Arguments of type Path may begin with `~`, which no shell expands in `--out=~/x`; those of type `in_home` too. An
    empty one, as of a shell variable that is not set, is refused: it would be the working directory.
    """

    def __init__(self, *arguments: object, **settings: object) -> None:
        super().__init__(*arguments, **settings)
        self.register("type", Path, lambda text: Path(_place(text)))
        self.register("type", in_home, _place)

    def error(self, message: str) -> NoReturn:
        """Raise `message` with the way to the list of options."""
        raise ConfigError(f"{self.prog}: {message}. `{self.prog} --help` lists what it takes")


def _place(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty (a shell variable that is not set?); `.` is this folder")
    return in_home(text)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Let settings `a.b=c` follow, as `overrides`."""
    # default=[]: without it argparse counts them among the arguments that it calls required.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="a.b=c", help="settings that replace those of the file"
    )


def add_setting(
    parser: argparse.ArgumentParser, option: str, *, schema: type[Config], field: str, kind: type, section: str
) -> None:
    """Add --`option` that replaces `section`.`field`; its help is the documentation of that field of `schema`."""
    documented = info_of(schema, field).doc.replace("%", "%%")
    parser.add_argument(
        f"--{option}", type=kind, dest=field, metavar="N", help=f"{documented} (default: {section}.{field} of the run)"
    )


def replace_settings(config: Config, *, changes: dict[str, float | int], section: str) -> Config:
    """`config` with `changes`; raises ConfigError naming the key in `section` whose value breaks a rule."""
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{type(config).__name__}.", f"{section}.")) from error
