"""Where a run keeps its checkpoints, as its config.yaml says. No torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ernie5.config.load import parse_file
from ernie5.errors import ConfigError

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"  # beside it in every run directory, and not beside a configuration that a person wrote
DEFAULT_FOLDER = "checkpoints"


def checkpoint_folders(path: Path) -> tuple[Path, ...]:
    """Where the checkpoints may be that `path`, a folder of checkpoints or a run, means; likeliest first.

    A run's checkpoint.dir is followed, wherever this process was started (`find_folder`); the config.yaml of a
    checkpoint or an export, which has weights beside it, says where another one is and is not.
    """
    is_run = path.is_dir() and not any(path.glob("*.safetensors"))
    elsewhere = written_setting(path / CONFIG_FILE, section="checkpoint", key="dir") if is_run else None
    return (*([find_folder(path, written=elsewhere)] if elsewhere else []), path, path / DEFAULT_FOLDER)


def folder_of_run(run_dir: Path, *, setting: str | None) -> Path:
    """Where the run in `run_dir` saves: checkpoint.dir as it is set now, else RUN_DIR/checkpoints.

    A relative setting with which the run was started before means the same place again, from whatever directory.
    """
    if setting is None:
        return run_dir / DEFAULT_FOLDER
    before = written_setting(run_dir / CONFIG_FILE, section="checkpoint", key="dir")
    if before is None or Path(setting).is_absolute() or not _ends_in(Path(before), setting):
        return _absolute(setting)
    return find_folder(run_dir, written=before)


def find_folder(run_dir: Path, *, written: str) -> Path:
    """The folder that checkpoint.dir = `written` in RUN_DIR/config.yaml means.

    An absolute one is what every run writes. Earlier ones wrote it as it was given, relative to where training was
    started: that directory is looked for where train.run_dir, relative to it too, leads back to the run, and around the
    run; checkpoints that name another run are another run's.
    """
    if Path(written).is_absolute():
        return Path(written)
    here, name = run_dir.resolve(), written_setting(run_dir / CONFIG_FILE, section="train", key="run_dir")
    given = Path(os.path.normpath(name or "."))
    starts = [parent for parent in here.parents if not given.is_absolute() and parent / given == here]
    starts += [Path.cwd(), here, *here.parents]
    found = (start / written for start in starts)
    return _absolute(next((folder for folder in found if _is_of_run(folder, name=name)), starts[0] / written))


def owner_of(folder: Path, *, newest: Path | None) -> Path | None:
    """The run that keeps its checkpoints in `folder`, None where there is none any more: the one around it, or the one
    that wrote `newest`, which names it as a whole path; its config.yaml must lead back here. One that cannot be
    looked at from here counts as gone."""
    name = written_setting(newest / CONFIG_FILE, section="train", key="run_dir") if newest is not None else None
    for run_dir in (folder.parent, *([Path(name)] if name is not None and Path(name).is_absolute() else [])):
        with contextlib.suppress(OSError):  # another user's, or on storage that is away
            setting = written_setting(run_dir / CONFIG_FILE, section="checkpoint", key="dir")
            is_run = all((run_dir / name).is_file() for name in (CONFIG_FILE, METRICS_FILE))
            if is_run and folder_of_run(run_dir, setting=setting).resolve() == folder.resolve():
                return run_dir
    return None


def written_setting(path: Path, *, section: str, key: str) -> str | None:
    """A text in a resolved configuration on disk, None where the file has none or is no configuration."""
    try:
        node = parse_file(path).get(section) if path.is_file() else None
    except ConfigError:
        return None
    found = node.get(key) if node is not None else None
    return found.value if found is not None and isinstance(found.value, str) and found.value else None


def _is_of_run(folder: Path, *, name: str | None) -> bool:
    """Whether the newest checkpoint of `folder` was written by the run whose train.run_dir was `name`."""
    configs = sorted(folder.glob(f"step-*/{CONFIG_FILE}"))
    return bool(configs) and written_setting(configs[-1], section="train", key="run_dir") == name


def _ends_in(path: Path, tail: str) -> bool:
    """Whether `path` is what the relative `tail` once meant, from some directory."""
    parts = [part for part in Path(os.path.normpath(tail)).parts if part != os.pardir]
    return bool(parts) and path.parts[-len(parts):] == tuple(parts)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))
