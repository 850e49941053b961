"""samples.json: what a gallery of generated and reconstructed samples holds; written here, read by the report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from ernie5.errors import DataError
from ernie5.generate.media import write_file

MANIFEST_NAME = "samples.json"


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """One sample. `task` as in `text_to_image`, or `image_reconstruction`; every side may be words, a file, or both.

    split: training, validation or free (a prompt of the user's own). Files are names inside the gallery's folder.
    """

    task: str
    split: str
    prompt: str = ""
    prompt_file: str = ""
    output: str = ""
    output_file: str = ""
    target: str = ""
    target_file: str = ""


@dataclasses.dataclass(frozen=True)
class Gallery:
    """All samples of one moment of a run. step: optimizer steps done; seconds: what making them took."""

    step: int
    seconds: float
    items: tuple[GalleryItem, ...]


def save_gallery(folder: Path, *, gallery: Gallery) -> Path:
    """Write samples.json into `folder` and return its path."""
    path = folder / MANIFEST_NAME
    text = json.dumps(dataclasses.asdict(gallery), ensure_ascii=False, indent=1)
    write_file(path, content=text.encode("utf-8"))
    return path


def load_gallery(folder: Path) -> Gallery:
    """Read `folder`/samples.json; raises DataError when it is missing or is not a gallery."""
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        items = tuple(GalleryItem(**item) for item in content["items"])
        return Gallery(step=content["step"], seconds=content["seconds"], items=items)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. `ernie5 generate CKPT --gallery {folder}` makes it.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a list of samples: {error}. Delete it and make the gallery again.") from error
