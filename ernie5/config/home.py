"""`~` at the start of a path that a person wrote: the shell sees neither that of a YAML file nor that of `a.b=~/c`."""

from __future__ import annotations

import os

from ernie5.errors import ConfigError


def in_home(path: str) -> str:
    """`path` with the home folder in the place of a leading `~` or `~name`; any other path as it is.

    Raises ConfigError where there is no such folder: else one of the name `~` would be made here.
    """
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        raise ConfigError(
            f"{path!r}: there is no home folder for {whole.split(os.sep)[0]}. Write the whole path, or ./{path} for a "
            "file of that name"
        )
    return whole
