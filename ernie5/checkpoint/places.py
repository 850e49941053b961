"""Where a run keeps its checkpoints, as its config.yaml says. No torch."""

from __future__ import annotations

from pathlib import Path

from ernie5.config.load import parse_file
from ernie5.errors import ConfigError

CONFIG_FILE = "config.yaml"
DEFAULT_FOLDER = "checkpoints"


def checkpoint_folders(path: Path) -> tuple[Path, ...]:
    """Where the checkpoints may be that `path`, a folder of checkpoints or a run, means; likeliest first.

    A run's checkpoint.dir is followed, relative to the present directory as it was in training; the config.yaml of a
    checkpoint or an export, which has weights beside it, says where another one is and is not.
    """
    is_run = path.is_dir() and not any(path.glob("*.safetensors"))
    elsewhere = written_setting(path / CONFIG_FILE, section="checkpoint", key="dir") if is_run else None
    return (*([Path(elsewhere)] if elsewhere else []), path, path / DEFAULT_FOLDER)


def written_setting(path: Path, *, section: str, key: str) -> str | None:
    """A text in a resolved configuration on disk, None where the file has none or is no configuration."""
    try:
        node = parse_file(path).get(section) if path.is_file() else None
    except ConfigError:
        return None
    found = node.get(key) if node is not None else None
    return found.value if found is not None and isinstance(found.value, str) and found.value else None
