"""Files are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ernie5.errors import EnvironmentFault
from ernie5.generate.media import write_file
from ernie5.observe.files import replace_file
from ernie5.tokenizers.text import train_text_tokenizer


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file takes three bytes and then no more, after it was emptied, as on a full disk."""

    def write(path: Path, content: bytes | str, *_: object, **__: object) -> int:
        with open(path, "wb") as file:
            file.write(content.encode()[:3] if isinstance(content, str) else content[:3])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(Path, "write_text", write)


def test_what_a_full_disk_refuses_leaves_the_old_file(tmp_path: Path, full_disk: None) -> None:
    tokenizer = train_text_tokenizer(["one two three"] * 4, vocab_size=260)
    for name, write in (
        ("picture.png", lambda path: write_file(path, content=b"a new picture")),
        ("text.json", lambda path: tokenizer.save(path)),
        ("any", lambda path: replace_file(path, content=b"something new")),
    ):
        with open(tmp_path / name, "wb") as file:
            file.write(b"good")
        with pytest.raises((OSError, EnvironmentFault), match="No space|disk is full"):
            write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"good"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["any", "picture.png", "text.json"]


def test_links_stay_links_and_what_is_no_file_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "place" / "file")
    for content in (b"one", b"two"):
        replace_file(tmp_path / "link", content=content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "place" / "file").read_bytes() == content
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_file(tmp_path / "pipe", content=b"three")
    assert os.read(reader, 10) == b"three" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
