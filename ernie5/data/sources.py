"""Recognise a user's own files: which file is a sample of which task, and which sidecar describes it.

The rules are listed in the folder's README and in `ernie5 data build --help`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import html.parser
import json
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from ernie5.data.samples import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Media,
    Sample,
    meta_from_json,
)
from ernie5.errors import DataError

TASK_OF_SUFFIX = {
    **dict.fromkeys(("txt", "md", "jsonl", "html", "htm"), "text"),
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
    **dict.fromkeys(AUDIO_SUFFIXES, "audio"),
}
PAGE_FILE = "page.json"
MARKDOWN_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
INVISIBLE_TAGS = frozenset(("script", "style", "head", "nav", "footer"))
BLOCK_TAGS = frozenset(("p", "div", "br", "li", "tr", "pre", "section", "h1", "h2", "h3", "h4", "h5", "h6"))


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file that becomes one sample (or many: jsonl). key: from its path; sidecar: its description, if any."""

    path: Path
    key: str
    task: str
    sidecar: Path | None = None


@dataclasses.dataclass(frozen=True)
class Scan:
    """What a folder holds: files to build from, in order of task and key, files that no rule recognises, and why
    folders cannot be looked into."""

    files: tuple[SourceFile, ...]
    ignored: tuple[Path, ...]
    closed: dict[Path, str]


def scan_folder(root: Path) -> Scan:
    """List the sample files under `root`. Raises DataError when it is missing, empty, or two files share a key."""
    if not root.is_dir():
        raise DataError(f"the source {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    paths, closed = _list_files(root)
    present = {_stem_and_suffix(path): path for path in paths}
    pages = {path.parent for path in paths if path.name == PAGE_FILE}
    found = [_recognise(path, root=root, present=present, pages=pages) for path in paths]
    files = [source for source in found if source is not None]
    shown = {image for source in files if source.task == "page" for image in _page_images(source.path)}
    linked = {path for path in paths if os.path.normpath(path) in shown}
    sidecars = {source.sidecar for source in files if source.sidecar}
    files = [f for f in files if f.path not in sidecars and not (f.path in linked and f.sidecar is None)]
    files.sort(key=lambda source: (source.task, source.key))
    _check_keys(files)
    if not files:
        ways = [*closed.values(), "`ernie5 data build --help` lists the rules."]
        raise DataError(f"{root} holds no file that can become a sample. {' | '.join(ways)}")
    taken = {f.path for f in files} | sidecars | linked
    ignored = tuple(p for p in paths if p not in taken and p.parent not in pages)
    return Scan(tuple(files), ignored, closed)


def _list_files(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """All files under `root`, links followed, sorted, without hidden ones; and why folders cannot be looked into.
    Links to nothing are listed, so that reading them says it."""
    refused: list[OSError] = []
    paths: list[Path] = []
    for name, folders, files in os.walk(root, followlinks=True, onerror=refused.append):
        here = Path(name)
        folders[:] = [inner for inner in folders if not _is_hidden(inner) and not _is_around(here / inner)]
        found = (here / file for file in files if not _is_hidden(file))
        paths += [path for path in found if os.path.isfile(path) or not os.path.exists(path)]
    return sorted(paths), {Path(error.filename): str(error) for error in refused}


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _is_around(folder: Path) -> bool:
    """Whether it is a link to a folder passed on the way to it: following that one would never end."""
    return folder.is_symlink() and any(passed.resolve().is_relative_to(folder.resolve()) for passed in folder.parents)


def _recognise(path: Path, *, root: Path, present: dict[tuple[Path, str], Path], pages: set[Path]) -> SourceFile | None:
    if path.name == PAGE_FILE:
        return SourceFile(path, make_key(path.parent, root=root), "page")
    task = TASK_OF_SUFFIX.get(path.suffix.lower().removeprefix("."))
    if task is None or path.parent in pages:
        return None
    if task == "text":
        has_images = path.suffix.lower() in (".md", ".html", ".htm") and bool(_page_images(path))
        return SourceFile(path, make_key(path.with_suffix(""), root=root), "page" if has_images else "text")
    stem = path.with_suffix("")
    sidecar = present.get((stem, ".json")) or present.get((stem, ".txt"))
    return SourceFile(path, make_key(stem, root=root), task, sidecar)


def _stem_and_suffix(path: Path) -> tuple[Path, str]:
    """A camera's A.PNG and A.TXT are a pair as a.png and a.txt are."""
    return path.with_suffix(""), path.suffix.lower()


def make_key(path: Path, *, root: Path) -> str:
    """A sample key from a path: folders joined by `-`; a hash is added when a character had to be replaced."""
    plain = "-".join(path.relative_to(root).parts) or root.resolve().name
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", plain)
    return safe if safe == plain else f"{safe}-{hashlib.sha256(os.fsencode(plain)).hexdigest()[:8]}"


def _check_keys(files: list[SourceFile]) -> None:
    owners: dict[str, Path] = {}
    for source in files:
        if source.key in owners:
            first = owners[source.key]
            raise DataError(f"{first} and {source.path} get the same key {source.key}. Rename one of them.")
        owners[source.key] = source.path


def load_source(source: SourceFile, *, language: str) -> Iterator[Sample | DataError]:
    """Read the sample(s) of one file; `language` fills what the files leave open. Raises DataError naming the file;
    that of a line of jsonl is yielded in its place, since the lines behind it are samples of their own."""
    if source.task == "page":
        yield _load_page(source, language=language)
    elif source.task == "text":
        yield from _load_text(source, language=language)
    else:
        yield _load_media(source, language=language)


def _load_media(source: SourceFile, *, language: str) -> Sample:
    if source.sidecar is None:
        raise DataError(
            f"{source.path} has no sidecar. Put its {'transcript' if source.task == 'audio' else 'caption'} into "
            f"{source.path.with_suffix('.txt').name}, or a description into {source.path.with_suffix('.json').name}."
        )
    text = _read_text(source.sidecar).strip()
    field = "transcript" if source.task == "audio" else "captions"
    raw: dict = {"task": source.task, "language": language}
    if source.sidecar.suffix.lower() == ".json":
        raw |= _parse_json(text, path=source.sidecar)
    else:
        raw[field] = text if source.task == "audio" else [{"language": language, "text": text}]
    meta = meta_from_json(raw | {"task": source.task}, where=str(source.sidecar))
    words = [meta.transcript or ""] if source.task == "audio" else [caption.text for caption in meta.captions]
    if not words or not all(text.strip() for text in words):
        empty = f"`{field}` is missing, or has no words" if source.sidecar.suffix.lower() == ".json" else "it is empty"
        raise DataError(f"{source.sidecar}: {empty}. It says what {source.path.name} holds.")
    suffix = source.path.suffix.lower().removeprefix(".")
    return Sample(source.key, meta, (Media(suffix, source.path.read_bytes()),))


def _load_text(source: SourceFile, *, language: str) -> Iterator[Sample | DataError]:
    text = _read_text(source.path)
    if source.path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n")):
            if line.strip():
                yield _load_line(line, source=source, number=number, language=language)
        return
    if source.path.suffix.lower() in (".html", ".htm"):
        text = "\n\n".join(value for kind, value in split_html(text) if kind == "text")
    raw = {"task": "text", "language": language, "text": text.strip()}
    yield Sample(source.key, meta_from_json(raw, where=str(source.path)))


def _load_line(line: str, *, source: SourceFile, number: int, language: str) -> Sample | DataError:
    where = f"{source.path}:{number + 1}"
    try:
        raw = {"language": language} | _parse_json(line, path=where) | {"task": "text"}
        if isinstance(raw.get("text"), str) and not raw["text"].strip():
            raw["text"] = ""
        return Sample(f"{source.key}-{number:06d}", meta_from_json(raw, where=where))
    except DataError as error:
        return error


def _load_page(source: SourceFile, *, language: str) -> Sample:
    pieces, raw = _page_pieces(source.path), {"language": language}
    if source.path.name == PAGE_FILE:
        raw |= _parse_json(_read_text(source.path), path=source.path)
    segments, media = [], []
    for kind, value in pieces:
        if kind == "text":
            segments.append({"text": value})
            continue
        path = _resolve_link(source.path, link=value)
        if path is None or not os.path.isfile(path):
            raise DataError(f"{source.path} shows {value}, which is not a file beside it.")
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in IMAGE_SUFFIXES:
            raise DataError(f"{source.path} shows {value}; pictures must be {', '.join(IMAGE_SUFFIXES)}.")
        media.append(Media(f"{len(media)}.{suffix}", path.read_bytes()))
        segments.append({"image": media[-1].name})
    meta = meta_from_json(raw | {"task": "page", "segments": segments}, where=str(source.path))
    return Sample(source.key, meta, tuple(media))


def _page_images(path: Path) -> set[str]:
    """Existing local pictures that a page shows (absolute links to the web do not count), as normal paths; none where
    it cannot be read, which `load_source` will say."""
    try:
        links = [_resolve_link(path, link=value) for kind, value in _page_pieces(path) if kind == "image"]
    except (DataError, OSError):
        return set()
    return {os.path.normpath(link) for link in links if link is not None and os.path.isfile(link)}


def _page_pieces(path: Path) -> list[tuple[str, str]]:
    text = _read_text(path)
    if path.name == PAGE_FILE:
        raw = _parse_json(text, path=path) | {"task": "page"}
        segments = meta_from_json(raw, where=str(path)).segments
        return [("image", s.image) if s.image is not None else ("text", s.text) for s in segments]
    if path.suffix.lower() in (".html", ".htm"):
        pieces = split_html(text)
    else:
        parts = MARKDOWN_IMAGE.split(text)
        pieces = [("image" if i % 2 else "text", part.strip()) for i, part in enumerate(parts)]
    return [p for p in pieces if p[1] and not (p[0] == "image" and _resolve_link(path, link=p[1]) is None)]


def _resolve_link(page: Path, *, link: str) -> Path | None:
    try:
        parsed = urllib.parse.urlsplit(link)
    except ValueError:  # `http://[` and the like: a broken address of the web
        return None
    return None if parsed.scheme or parsed.netloc else page.parent / urllib.parse.unquote(parsed.path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}). Convert it, for instance with iconv.") from error


def _parse_json(text: str, *, path: Path | str) -> dict:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:  # no json, a number of too many digits, nested too deep
        raise DataError(f"{path} is not json that can be read ({error}).") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path}: the description must be a json object, not {type(raw).__name__}.")
    return raw


class _PieceParser(html.parser.HTMLParser):
    """Collects visible text and pictures of an html page in order."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[tuple[str, str]] = []
        self._text: list[str] = []
        self._depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._depth += tag in INVISIBLE_TAGS
        if tag in BLOCK_TAGS:
            self._text.append("\n")
        if tag == "img" and not self._depth:
            self.flush()
            self.pieces.append(("image", dict(attrs).get("src") or ""))

    def handle_endtag(self, tag: str) -> None:
        self._depth = max(0, self._depth - (tag in INVISIBLE_TAGS))
        if tag in BLOCK_TAGS:
            self._text.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self._text.append(data)

    def flush(self) -> None:
        """Close the current run of text."""
        text = re.sub(r"[ \t]*\n\s*\n\s*", "\n\n", "".join(self._text)).strip()
        if text:
            self.pieces.append(("text", text))
        self._text = []


def split_html(text: str) -> list[tuple[str, str]]:
    """The visible pieces of an html page in order: ("text", words) and ("image", src)."""
    parser = _PieceParser()
    parser.feed(text)
    parser.close()
    parser.flush()
    return parser.pieces
