"""Interleaved pages: the scikit-image example gallery, explanations between small pictures."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from PIL import Image
from plan import CutPlan
from tqdm import tqdm

from ernie5.data.sources import split_html

TAIL = re.compile(r"\n*(Total running time|Download Python source|Gallery generated|Previous\n|©).*", re.DOTALL)
NOTE = re.compile(r"Note\s+Click\s+here\s+to download the full example code(\s+or\s.*?Binder)?\s*", re.DOTALL)
OUTPUT = re.compile(r"(?m)^(\[\]|Out:)\s*$")
CODE_CHARACTERS = 1200


def stage_pages(sources: Path, *, folder: Path, plan: CutPlan) -> None:
    """`page.json` folders with pictures of at most `plan.page_image_pixels`."""
    root = sources / "python-skimage-doc/usr/share/doc/python-skimage-doc/html"
    pages = [path for path in sorted((root / "auto_examples").rglob("plot_*.html"))]
    written = 0
    for path in tqdm(pages, desc="pages", unit="page"):
        if written == plan.pages:
            break
        body = path.read_text(encoding="utf-8").partition('role="main">')[2]
        segments, images = _read_segments(body, page=path)
        if len(images) == 0 or len(segments) < 2:
            continue
        target = folder / f"{path.parent.name}-{path.stem.removeprefix('plot_')}"
        target.mkdir(parents=True)
        for name, image in images.items():
            (target / name).write_bytes(_shrink(image, plan=plan))
        page = {"segments": segments, "language": "en", "source": "scikit-image"}
        (target / "page.json").write_text(json.dumps(page, ensure_ascii=False), encoding="utf-8")
        written += 1


def _read_segments(body: str, *, page: Path) -> tuple[list[dict[str, str]], dict[str, Path]]:
    segments: list[dict[str, str]] = []
    images: dict[str, Path] = {}
    for kind, value in split_html(body):
        if kind == "image" and "_images/" in value:
            name = f"figure{len(images)}.webp"
            images[name] = page.parent / value
            segments.append({"image": name})
        elif kind == "text":
            text = TAIL.sub("", NOTE.sub("", value)).replace("¶", "")
            text = OUTPUT.sub("", text).strip()
            if text:
                segments.append({"text": text[:CODE_CHARACTERS]})
    return segments, {name: path for name, path in images.items() if path.is_file()}


def _shrink(path: Path, *, plan: CutPlan) -> bytes:
    """The picture on white, fitted into a square of `page_image_pixels` whole, as WebP."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    side = plan.page_image_pixels
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    out = io.BytesIO()
    square.convert("RGB").save(out, "WEBP", quality=plan.page_image_quality, method=6)
    return out.getvalue()
