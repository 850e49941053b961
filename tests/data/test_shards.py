"""Shards: listing, indexing, random access, splits, and damaged archives."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import pytest

from ernie5.data.shards import Corpus, Media, Sample, SampleMeta, ShardWriter, list_shards, open_corpus, split_of
from ernie5.errors import DataError, EnvironmentFault


def write_shards(folder: Path, *, count: int = 20, compression: str = "none", prefix: str = "s") -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, prefix=prefix, max_bytes=2000, compression=compression) as writer:
        for i in range(count):
            meta = SampleMeta(task="audio", language="en", transcript=f"{prefix} {i}", seconds=float(i))
            writer.write(Sample(f"{prefix}-{i:03d}", meta, (Media("wav", bytes([i % 256]) * (100 + i)),)))
    return tuple(writer.paths)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def read_in_worker(corpus: Corpus, index: int) -> bytes:
    return corpus.read(corpus.refs[index]).media[0].data


@pytest.mark.parametrize("compression", ["none", "gzip", "xz"])
def test_samples_come_back_in_any_order(tmp_path: Path, compression: str) -> None:
    corpus = open_corpus(write_shards(tmp_path, compression=compression))
    assert len(corpus.shards) > 1
    for i in (19, 0, 7, 7, 12):
        sample = corpus.read(corpus.samples("audio")[i])
        assert sample.key == f"s-{i:03d}"
        assert sample.meta.transcript == f"s {i}"
        assert sample.media == (Media("wav", bytes([i]) * (100 + i)),)


def test_webdataset_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    import webdataset

    paths = [str(path) for path in write_shards(tmp_path)]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(paths, shardshuffle=False)]
    assert keys == [f"s-{i:03d}" for i in range(20)]


def test_archives_of_other_tools_are_read(tmp_path: Path) -> None:
    long_name = "folder/" + "é" * 120
    for number, layout in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=layout) as tar:
            tar.add(tmp_path, arcname="folder", recursive=False)
            add(tar, f"{long_name}{number}.json", b'{"task": "image", "captions": ["x"]}')
            add(tar, f"{long_name}{number}.PNG", b"pixels")
            add(tar, "folder/.DS_Store", b"rubbish")
    corpus = open_corpus(list_shards(str(tmp_path)))
    assert [ref.key for ref in corpus.refs] == [long_name + "0", long_name + "1"]
    assert corpus.read(corpus.refs[1]).find_media("png").data == b"pixels"


def test_every_sample_is_in_exactly_one_split(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, count=200)
    train, validation = (open_corpus(shards, split=split) for split in ("train", "validation"))
    assert {r.key for r in train.refs}.isdisjoint(r.key for r in validation.refs)
    assert len(train) + len(validation) == 200
    assert 1 <= len(validation) <= 25


def test_the_split_depends_on_the_key_alone() -> None:
    parts = [split_of(f"k{i}") for i in range(4000)]
    assert 0.04 < parts.count("validation") / 4000 < 0.06
    assert split_of("image-1f600") == split_of("image-1f600")


def test_a_description_may_choose_its_split(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, prefix="t", max_bytes=10**6) as writer:
        for i in range(30):
            writer.write(Sample(f"t{i}", SampleMeta(task="text", text="x", split="validation")))
    assert len(open_corpus(tuple(writer.paths), split="validation")) == 30


@pytest.mark.parametrize("cut", [1, 511, 512, 1024, 1500, -10300])
def test_a_truncated_tar_is_one_clear_error(tmp_path: Path, cut: int) -> None:
    path = write_shards(tmp_path, count=6)[0]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=f"{path.name} is not a whole tar"):
        open_corpus((path,))


@pytest.mark.parametrize(("data", "words"), [
    (b"", "it is empty"), (b"hello", "its 5 bytes are less than a header"), (b"x" * 5000, "header"),
])
def test_a_file_that_is_no_tar_is_one_clear_error(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "bad.tar").write_bytes(data)
    with pytest.raises(DataError, match=f"bad.tar.*{words}"):
        open_corpus((tmp_path / "bad.tar",))


@pytest.mark.parametrize("suffix", ["gzip", "xz"])
def test_a_truncated_packed_shard_is_one_clear_error(tmp_path: Path, suffix: str) -> None:
    path = write_shards(tmp_path, compression=suffix)[0]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="truncated or damaged"):
        open_corpus((path,))


def test_a_flipped_header_byte_is_noticed(tmp_path: Path) -> None:
    path = write_shards(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        open_corpus((path,))


def test_a_shard_that_shrinks_after_opening_names_the_sample(tmp_path: Path) -> None:
    path = write_shards(tmp_path)[0]
    corpus = open_corpus((path,))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="s-00"):
        corpus.read(corpus.refs[-1])


def test_media_without_json_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "lonely.png", b"pixels")
    with pytest.raises(DataError, match="lonely has 0 json members"):
        open_corpus((tmp_path / "a.tar",))


@pytest.mark.parametrize("raw", [b"[]", b"{", b'{"task": "smell"}', b'{"task": "text"}', b'{"task": "page"}', b"\xff"])
def test_a_broken_description_names_shard_and_sample(tmp_path: Path, raw: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "k.json", raw)
    with pytest.raises(DataError, match="a.tar: sample k"):
        open_corpus((tmp_path / "a.tar",))


def test_one_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path / "a"), write_shards(tmp_path / "b")
    with pytest.raises(DataError, match="occurs twice"):
        open_corpus(first + second)


@pytest.mark.parametrize("patterns", [(), ("nowhere/*.tar",), ("missing.tar",)])
def test_an_empty_list_of_shards_is_refused(patterns: tuple[str, ...]) -> None:
    with pytest.raises(DataError):
        list_shards(patterns)


def test_a_corpus_without_samples_of_the_split_is_refused(tmp_path: Path) -> None:
    absent = "train" if split_of("s-000") == "validation" else "validation"
    with pytest.raises(DataError, match=f"no sample for {absent}"):
        open_corpus(write_shards(tmp_path, count=1), split=absent)
    with pytest.raises(DataError, match="split is 'test'"):
        open_corpus(write_shards(tmp_path, count=1), split="test")
    with pytest.raises(DataError):
        open_corpus(())


def test_globs_folders_and_names_give_each_shard_once(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    assert list_shards((str(tmp_path), str(tmp_path / "s-*.tar"), str(paths[0]))) == paths


def test_a_corpus_travels_to_workers(tmp_path: Path) -> None:
    corpus = open_corpus(write_shards(tmp_path))
    corpus.read(corpus.refs[3])
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.read(copy.refs[5]) == corpus.read(corpus.refs[5])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.starmap(read_in_worker, [(corpus, i) for i in range(20)])
    assert found == [bytes([i]) * (100 + i) for i in range(20)]


def test_the_embedded_corpus_unpacks_each_shard_once_and_holds_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, calls = list_shards("sample"), []
    for module in (gzip, lzma):
        unpack = module.decompress
        monkeypatch.setattr(module, "decompress", lambda data, unpack=unpack: calls.append(1) or unpack(data))
    corpus = open_corpus(shards)
    assert len(calls) == len(shards)
    assert set(corpus.tasks()) == {"text", "image", "video", "audio", "page"}
    assert sum(path.stat().st_size for path in shards) < 11.5e6
    assert {"en", "zh"} <= {ref.language for ref in corpus.samples("text")}
    for task in corpus.tasks():
        assert {ref.split for ref in corpus.samples(task)} == {"train", "validation"}


def test_packed_shards_are_not_unpacked_once_per_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(write_shards(tmp_path, compression="xz"))
    calls = []
    unpack = lzma.decompress
    monkeypatch.setattr(lzma, "decompress", lambda data: calls.append(1) or unpack(data))
    for ref in corpus.refs:
        corpus.read(ref)
    assert len(calls) == len(corpus.shards)


@pytest.mark.parametrize("compression", ["none", "gzip", "xz"])
def test_a_shard_that_the_machine_refuses_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    paths = write_shards(tmp_path, compression=compression)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentFault, match=r"cannot be read: Permission denied\. Look at"):
        open_corpus(paths)


def test_a_gzip_shard_with_changed_bytes_is_refused_by_name(tmp_path: Path) -> None:
    path = write_shards(tmp_path, compression="gzip")[0]
    whole = path.read_bytes()
    for place in range(10, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :])
        with pytest.raises(DataError, match="s-000000.tar.gz"):
            open_corpus((path,))
