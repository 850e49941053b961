"""Features on disk: whole entries or none, one encoding per medium for all processes, a limit on the room."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ernie5.data.config import DataConfig
from ernie5.data.feature_store import FeatureStore, store_folder
from ernie5.data.features import FeatureCache, Speech, open_store
from ernie5.tokenizers.bundle import TokenizerBundle, TokenizerIdentities

SPEECH = Speech(codes=torch.arange(6).reshape(3, 2), speaker=torch.linspace(-1, 1, 160))


def _store(folder: Path, *, max_bytes: int = 1 << 20, context: str = "a") -> FeatureStore:
    return FeatureStore(folder, max_bytes=max_bytes, context=context)


def _get(folder: Path, calls: list[int], *, content: bytes = b"sound", context: str = "a", max_bytes: int = 1 << 20):
    def compute() -> Speech:
        calls.append(1)
        return SPEECH

    cache = FeatureCache(1 << 20, store=_store(folder, context=context, max_bytes=max_bytes))
    return cache.get("key", purpose="hear", compute=compute, content=content)


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_second_process_finds_what_the_first_computed(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        found = _get(tmp_path, calls)
        assert torch.equal(found.codes, SPEECH.codes) and torch.equal(found.speaker, SPEECH.speaker)
        assert found.codes.dtype == torch.int64
    assert len(calls) == 1 and len(_entries(tmp_path)) == 1


def test_other_bytes_and_other_tokenizers_are_other_entries(tmp_path: Path) -> None:
    calls: list[int] = []
    for content, context in ((b"a", "x"), (b"b", "x"), (b"a", "y")):
        _get(tmp_path, calls, content=content, context=context)
    assert len(calls) == 3


def _damage(data: bytes, kind: str) -> bytes:
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    return {"empty": b"", "cut": data[:-9], "flipped": flipped, "foreign": b"hello, I am no entry at all"}[kind]


@pytest.mark.parametrize("kind", ["empty", "cut", "flipped", "foreign"])
def test_a_damaged_entry_is_computed_again_and_replaced(tmp_path: Path, kind: str) -> None:
    calls: list[int] = []
    _get(tmp_path, calls)
    (path,) = _entries(tmp_path)
    path.write_bytes(_damage(path.read_bytes(), kind))
    for _ in range(2):
        assert torch.equal(_get(tmp_path, calls).codes, SPEECH.codes)
    assert len(calls) == 2


def test_a_full_folder_takes_nothing_more_and_loses_its_oldest_when_opened(tmp_path: Path) -> None:
    calls: list[int] = []
    _get(tmp_path, calls)
    (first,) = _entries(tmp_path)
    size = first.stat().st_size
    _get(tmp_path, calls, content=b"second", max_bytes=2 * size - 1)
    assert _entries(tmp_path) == [first]
    _store(tmp_path, max_bytes=size - 1)
    assert not _entries(tmp_path)


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = _store(tmp_path / "file")
    for number in range(2):
        store.write(store.key_of(bytes([number]), purpose="hear"), [SPEECH.codes])
    assert len(caplog.records) == 1 and "features are not kept" in caplog.text


def test_untrained_tokenizers_share_nothing(tmp_path: Path, tiny_tokenizers: TokenizerBundle) -> None:
    config = DataConfig(feature_cache=str(tmp_path))
    assert open_store(config, tokenizers=tiny_tokenizers) is None
    known = dataclasses.replace(tiny_tokenizers, identities=TokenizerIdentities("t", "v", "a"))
    assert open_store(config, tokenizers=known) is not None
    assert open_store(dataclasses.replace(config, feature_cache="none"), tokenizers=known) is None


def test_the_users_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert store_folder("user") == Path("/some/cache/ernie5/features")
    assert store_folder("none") is None and store_folder("/x/y") == Path("/x/y")
