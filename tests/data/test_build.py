"""`ernie5 data build`: what is recognised, what is refused, and that nothing half-written stays behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ernie5.config.load import config_from_dict
from ernie5.data.build import BuildOptions, build_corpus
from ernie5.data.command import main
from ernie5.data.config import BuildSections
from ernie5.data.shards import Corpus, list_shards, open_corpus
from ernie5.errors import ConfigError, DataError, EnvironmentFault


def build(source: Path, out: Path, **changes: object) -> Corpus:
    build_corpus(BuildOptions(source=source, out=out, progress=False, **changes))
    return open_corpus(list_shards(str(out)))


def keys(corpus: Corpus, task: str) -> list[str]:
    return [ref.key for ref in corpus.samples(task)]


def test_every_kind_of_file_becomes_its_task(user_folder: Path, tmp_path: Path) -> None:
    corpus = build(user_folder, tmp_path / "out")
    assert len(keys(corpus, "text")) == 4  # note, read me, two lines of jsonl; hidden files stay out
    assert keys(corpus, "image") == ["cat", "dog"]
    assert keys(corpus, "video") == ["fade"]
    assert keys(corpus, "audio") == ["hello"]
    assert keys(corpus, "page") == ["pages-cat", "site", "story"]


def test_sidecars_fill_the_description(user_folder: Path, tmp_path: Path) -> None:
    corpus = build(user_folder, tmp_path / "out", language="fr")
    cat, dog = (corpus.read(ref).meta for ref in corpus.samples("image"))
    assert (cat.caption("zh"), cat.keywords, cat.group) == ("猫", ("pet",), "animals")
    assert dog.caption("fr") == "a dog"
    hello = corpus.read(corpus.samples("audio")[0]).meta
    assert (hello.transcript, hello.language, hello.seconds) == ("привет", "ru", 0.5)
    assert corpus.read(corpus.samples("video")[0]).meta.frames == 5


def test_pages_keep_the_order_of_text_and_pictures(user_folder: Path, tmp_path: Path) -> None:
    corpus = build(user_folder, tmp_path / "out")
    folder, html, markdown = (corpus.read(ref) for ref in corpus.samples("page"))
    assert [s.text or s.image for s in folder.meta.segments] == ["look", "0.png", "there"]
    assert [s.text or s.image for s in html.meta.segments] == ["Hi you", "0.png", "Bye"]
    assert [s.text or s.image for s in markdown.meta.segments] == ["Before", "0.png", "after", "end."]
    assert folder.find_media("0.png").data == (user_folder / "pages/cat/figure.png").read_bytes()


def test_two_builds_give_the_same_bytes_and_the_manifest_knows_them(user_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(user_folder, tmp_path / name, compression="gzip")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text("utf-8"))
    assert manifest == json.loads((tmp_path / "two" / "manifest.json").read_text("utf-8"))
    assert manifest["samples"] == {"audio": 1, "image": 2, "page": 3, "text": 4, "video": 1}
    assert sum(manifest["splits"].values()) == 11
    for shard in manifest["shards"]:
        data = (tmp_path / "one" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_shards_are_cut_at_the_given_size(user_folder: Path, tmp_path: Path) -> None:
    corpus = build(user_folder, tmp_path / "out", shard_mebibytes=1e-6)
    assert len(corpus.shards) == len(corpus)


def test_existing_output_is_kept_unless_forced(user_folder: Path, tmp_path: Path) -> None:
    build(user_folder, tmp_path / "out")
    with pytest.raises(DataError, match="--force"):
        build(user_folder, tmp_path / "out")
    assert len(build(user_folder, tmp_path / "out", force=True)) == 11


def test_force_never_removes_a_folder_that_build_did_not_write(user_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious", "utf-8")
    with pytest.raises(DataError, match="was not written by"):
        build(user_folder, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").is_file()


def test_all_bad_files_are_named_and_nothing_stays_behind(
    user_folder: Path, tmp_path: Path, media_writers: tuple
) -> None:
    write_image, write_clip, write_tone = media_writers
    (user_folder / "dog.png").write_bytes(b"not a picture")
    write_clip(user_folder / "fade.mp4", frames=30)
    write_tone(user_folder / "hello.wav", seconds=3)
    write_image(user_folder / "lonely.png")
    (user_folder / "note.txt").write_bytes(b"\xff\xfe latin")
    with pytest.raises(DataError) as caught:
        build(user_folder, tmp_path / "out", max_audio_seconds=2.0)
    message = str(caught.value)
    for part in ("5 of", "dog.png", "more than 17 frames", "lasts 3.0 s", "lonely.txt", "note.txt is not UTF-8"):
        assert part in message
    assert "\n" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]


def test_skip_bad_leaves_bad_files_out(user_folder: Path, tmp_path: Path) -> None:
    (user_folder / "dog.png").write_bytes(b"not a picture")
    assert keys(build(user_folder, tmp_path / "out", skip_bad=True), "image") == ["cat"]


@pytest.mark.parametrize("line", ['{"text": 3}', '{"text": ""}', "[1]", "{", '{"text": "x", "split": "test"}'])
def test_a_bad_jsonl_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n", "utf-8")
    with pytest.raises(DataError, match="a.jsonl:2"):
        build(tmp_path / "mine", tmp_path / "out")


def test_a_page_that_shows_a_missing_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "page.json").write_text('{"segments": [{"image": "gone.png"}]}', "utf-8")
    with pytest.raises(DataError, match="gone.png"):
        build(tmp_path / "mine", tmp_path / "out")


def test_two_files_with_one_key_are_refused(tmp_path: Path, media_writers: tuple) -> None:
    (tmp_path / "mine").mkdir()
    media_writers[0](tmp_path / "mine" / "a.png")
    media_writers[2](tmp_path / "mine" / "a.wav")
    (tmp_path / "mine" / "a.txt").write_text("both", "utf-8")
    with pytest.raises(DataError, match="same key a"):
        build(tmp_path / "mine", tmp_path / "out")


def test_the_case_of_a_suffix_decides_nothing(tmp_path: Path, media_writers: tuple) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, text in (("A.TXT", "a cat"), ("B.JSON", '{"captions": [{"language": "en", "text": "a dog"}]}'),
                       ("C.txt", "a cow"), ("D.Txt", "a hen"), ("E.TXT", "words alone")):
        (mine / name).write_text(text, "utf-8")
    for name in ("A.PNG", "B.png", "C.PNG", "D.Png"):
        media_writers[0](mine / "picture.png")
        (mine / "picture.png").rename(mine / name)
    corpus = build(mine, tmp_path / "out")
    said = {ref.key: corpus.read(ref).meta.captions[0].text for ref in corpus.samples("image")}
    assert said == {"A": "a cat", "B": "a dog", "C": "a cow", "D": "a hen"} and keys(corpus, "text") == ["E"]
    (mine / "A.txt").write_text("another one", "utf-8")
    with pytest.raises(DataError, match="same key A"):
        build(mine, tmp_path / "again")


@pytest.mark.parametrize("prepare", [lambda p: None, lambda p: p.mkdir()])
def test_a_missing_or_empty_source_is_refused(tmp_path: Path, prepare: object) -> None:
    prepare(tmp_path / "mine")
    with pytest.raises(DataError):
        build(tmp_path / "mine", tmp_path / "out")


def test_file_names_of_any_script_get_distinct_keys(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("猫.txt", "犬.txt", "a b.txt", "a_b.txt", "v1.2.txt"):
        (tmp_path / "mine" / name).write_text(name, "utf-8")
    corpus = build(tmp_path / "mine", tmp_path / "out")
    assert sorted(corpus.read(ref).meta.text for ref in corpus.samples("text")) == sorted(
        ("猫.txt", "犬.txt", "a b.txt", "a_b.txt", "v1.2.txt")
    )


def sections(**data: object) -> BuildSections:
    return config_from_dict({"data": data}, schema=BuildSections)


def test_media_that_cannot_fit_a_row_are_refused_by_name_with_their_positions_and_the_way_out(
    user_folder: Path, tmp_path: Path
) -> None:
    (user_folder / "dog.txt").write_text("a dog that barks " * 60, "utf-8")
    with pytest.raises(DataError) as caught:
        build(user_folder, tmp_path / "out", sections=sections(sequence_tokens=230))
    message = str(caught.value)
    assert message.startswith("2 of 10 files cannot be used")
    positions = re.search(r"dog.png takes (\d+) positions as text_to_image \((\d+) of its words\), .* 230", message)
    assert int(positions[1]) - int(positions[2]) == 5 + 130 - 1 + 64  # BOS SEP BOI EOI EOS, scales 2 to 6, finished
    clip = re.search(r"fade.mp4 takes (\d+) positions as text_to_video \((\d+) of its words\)", message)
    assert int(clip[1]) - int(clip[2]) == 5 + 5 * (30 - 1 + 16)
    assert f"--sequence-tokens {positions[1]}" in message
    rows = sections(sequence_tokens=int(positions[1]))
    assert keys(build(user_folder, tmp_path / "out", sections=rows), "image") == ["cat", "dog"]


def test_sound_and_pictures_of_pages_that_cannot_fit_are_refused(user_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(user_folder, tmp_path / "out", sections=sections(sequence_tokens=14))
    found = re.search(r"hello.wav takes (\d+) positions as text_to_audio \((\d+) of its words\)", str(caught.value))
    assert int(found[1]) - int(found[2]) == 6 + 7  # BOS SEP SPK BOA EOA EOS, half a second at 12.5 frames a second
    assert "story.md: a picture takes 19 positions as page" in str(caught.value)  # 16 merged patches, BOI EOI, EOS


def test_tasks_without_a_share_need_no_room(user_folder: Path, tmp_path: Path) -> None:
    rows = sections(sequence_tokens=60, mixture={"text_to_image": 0.0, "text_to_video": 0.0})
    assert keys(build(user_folder, tmp_path / "out", sections=rows), "video") == ["fade"]


@pytest.mark.parametrize("option", [["--sequence-tokens", "100"], ["--config", "mine.yaml"]])
def test_the_command_takes_the_row_from_an_option_or_a_training_config(
    user_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("data: {sequence_tokens: 100}\ntrain: {steps: 3, run_dir: runs/x}\n", "utf-8")
    with pytest.raises(DataError, match="cat.webp takes .* but a row has 100,"):
        main(["build", str(user_folder), "--out", "out", "--quiet", *option])
    assert main(["build", str(user_folder), "--out", "out", "--quiet", *option, "--sequence-tokens", "512"]) == 0


@pytest.mark.parametrize(
    ("option", "complaint"),
    [(["--sequence-tokens", "many"], "data.sequence_tokens"), (["--sequence-tokens", "1"], "data.sequence_tokens = 1"),
     (["--config", "gone.yaml"], "no config file"), (["--config", "other.yaml"], "none of the sections")],
)
def test_a_bad_row_or_config_is_one_line(
    user_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("tokenizer: {kind: text}\n", "utf-8")
    with pytest.raises(ConfigError, match=complaint):
        main(["build", str(user_folder), "--out", "out", "--quiet", *option])


def test_a_place_that_cannot_be_written_names_out_and_not_a_training_setting(user_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentFault, match=r"Cannot write .*out: a file stands .* another --out"):
        build_corpus(BuildOptions(user_folder, tmp_path / "file" / "out", progress=False))


def folder_of(root: Path, **files: str | bytes) -> Path:
    """A folder `mine` in `root` with these files; `__` in a name is a slash, `_DOT_` a dot."""
    for name, content in files.items():
        path = root / "mine" / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root / "mine"


def texts(corpus: Corpus) -> list[str]:
    return [corpus.read(ref).meta.text for ref in corpus.samples("text")]


def test_a_line_of_jsonl_with_the_key_of_a_file_is_named_and_does_not_make_shards_that_nobody_can_open(
    tmp_path: Path,
) -> None:
    mine = folder_of(tmp_path, a_DOT_jsonl='{"text": "one"}\n{"text": "two"}\n')
    (mine / "a-000000.txt").write_text("file")
    with pytest.raises(DataError, match=r"a\.jsonl and .*a-000000\.txt give the same key a-000000\. Rename"):
        build(mine, tmp_path / "out")
    assert texts(build(mine, tmp_path / "out", skip_bad=True)) == ["one", "two"]


def test_skip_bad_leaves_bad_lines_out_and_not_those_behind_them(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "{", '{"text": "three"}', '{"text": 4}', '{"text": " "}', '{"text": "six"}']
    lines += ["[" * 10**5, '{"text": "x", "n": ' + "1" * 5000 + "}"]
    mine = folder_of(tmp_path, a_DOT_jsonl="\n".join(lines), b_DOT_txt="b")
    with pytest.raises(DataError, match=r"^1 of 2 files cannot be used .*a\.jsonl:2 .*:4.*:5.*:7.*:8 "):
        build(mine, tmp_path / "out")
    options = BuildOptions(mine, tmp_path / "out", skip_bad=True, progress=False)
    assert len(build_corpus(options).problems) == 5
    assert texts(open_corpus(list_shards(str(tmp_path / "out")))) == ["one", "three", "six", "b"]


@pytest.mark.parametrize(
    "page", [b"caf\xe9 ![x](a.png)", b"![x](http://[oops) words", b"![x](" + b"a" * 5000 + b".png)"]
)
def test_a_page_that_cannot_be_read_or_shows_strange_addresses_does_not_end_the_scan(
    tmp_path: Path, page: bytes
) -> None:
    mine = folder_of(tmp_path, a_DOT_md=page, b_DOT_txt="b")
    assert texts(build(mine, tmp_path / "out", skip_bad=True))[-1] == "b"


def test_file_names_that_are_no_utf8_get_keys(tmp_path: Path) -> None:
    mine = folder_of(tmp_path, a_DOT_txt="a")
    (mine / os.fsdecode(b"caf\xe9.txt")).write_text("coffee")
    assert sorted(texts(build(mine, tmp_path / "out"))) == ["a", "coffee"]


def test_pictures_of_a_page_may_lie_in_other_folders_and_need_no_caption_there(
    tmp_path: Path, media_writers: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments = '{"segments": [{"text": "see"}, {"image": "img/f.png"}]}'
    mine = folder_of(tmp_path, page_DOT_json=segments, docs__a_DOT_md="x ![x](../img/g.png)")
    (mine / "img").mkdir()
    for name in "fg":
        media_writers[0](mine / "img" / f"{name}.png")
    assert keys(build(mine, tmp_path / "out"), "page") == ["docs-a", "mine"]
    monkeypatch.chdir(mine)
    assert keys(build(Path("."), tmp_path / "here"), "page") == ["docs-a", "mine"]


def test_links_are_followed_once_and_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    mine = folder_of(tmp_path, a_DOT_txt="a", b__b_DOT_txt="b")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("c")
    (mine / "c").symlink_to(tmp_path / "elsewhere")
    (mine / "b" / "up").symlink_to(mine)
    (tmp_path / "elsewhere" / "back").symlink_to(mine / "b")
    (mine / "b" / "there").symlink_to(tmp_path / "elsewhere")
    corpus = build(mine, tmp_path / "out")
    assert set(texts(corpus)) == {"a", "b", "c"} and "c-c" in keys(corpus, "text")
    (mine / "gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone\.txt"):
        build(mine, tmp_path / "again")


@pytest.mark.parametrize("described", ['{"captions": [{"text": " "}]}', '{"captions": []}', '{"caption": "x"}'])
def test_a_description_without_words_is_refused_by_its_field(
    tmp_path: Path, media_writers: tuple, described: str
) -> None:
    mine = folder_of(tmp_path, a_DOT_json=described)
    media_writers[0](mine / "a.png")
    with pytest.raises(DataError, match=r"a\.json: `captions` is missing, or has no words\. .*a\.png"):
        build(mine, tmp_path / "out")


@pytest.mark.parametrize("option", ["--shard-mebibytes", "--max-audio-seconds"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1"])
def test_limits_that_are_none_are_refused(user_folder: Path, tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"{option} {value}: must be a number above 0"):
        main(["build", str(user_folder), "--out", str(tmp_path / "out"), option, value])


def test_force_removes_neither_the_source_nor_a_file_nor_a_folder_with_a_manifest_of_somebody_else(
    tmp_path: Path,
) -> None:
    mine = folder_of(tmp_path, manifest_DOT_json='{"name": "app"}', a_DOT_txt="a")
    (tmp_path / "thesis.txt").write_text("precious")
    built = tmp_path / "out"
    build(mine, built)
    (built / "notes.txt").write_text("mine")
    for out in (mine, tmp_path / "thesis.txt", built, tmp_path):
        with pytest.raises(DataError, match="was not written by"):
            build(mine, out, force=True)
    assert (mine / "a.txt").read_text() == "a" and (tmp_path / "thesis.txt").read_text() == "precious"
    (built / "notes.txt").unlink()
    build(mine, built, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "thesis.txt"]


def test_force_keeps_the_old_shards_where_the_new_ones_cannot_take_their_place(
    user_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(user_folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (user_folder / "note.txt").write_text("another")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(errno.ENOSPC, "full", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(EnvironmentFault, match="disk is full"):
        build(user_folder, out, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("killed_in", ["_write_shards", "_put"])
def test_what_a_killed_build_left_goes_with_the_next_one_and_that_of_others_stays(
    user_folder: Path, tmp_path: Path, killed_in: str
) -> None:
    out = tmp_path / "out"
    build(user_folder, out)
    kill = f"""
import os, pathlib, signal, shutil
from ernie5.data import build
def end(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
build.{killed_in} = end if {killed_in!r} != "_put" else build._put
build.shutil.rmtree = end  # when the new shards are in place, and the old ones not yet gone
build.build_corpus(build.BuildOptions(source=pathlib.Path({str(user_folder)!r}), out=pathlib.Path({str(out)!r}),
                                      progress=False, force=True))
"""
    ended = subprocess.run([sys.executable, "-c", kill], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name.startswith("out."))
    number = left.name.split("-")[1]
    alive, far = (tmp_path / left.name.replace(number, str(os.getpid())), tmp_path / f"{left.name}x")
    kept = (alive, far, tmp_path / "out.partial-mine", tmp_path / f"outer{left.name.removeprefix('out')}")
    for path in kept:
        path.mkdir()
    build(user_folder, out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("mine", "out", *(path.name for path in kept)))


def test_shards_that_a_killed_build_was_about_to_replace_get_their_name_back(
    user_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(user_folder, out)
    ended = subprocess.run([sys.executable, "-c", f"""
import os, pathlib, signal
from ernie5.data import build
name = f"out.replaced-{{os.getpid()}}-0123abcd-{{build._host()}}"
pathlib.Path({str(out)!r}).rename(pathlib.Path({str(tmp_path)!r}, name))
"""], check=False)
    assert ended.returncode == 0 and not out.exists()
    monkeypatch.setattr("ernie5.data.build._write_shards", lambda *_, **__: pytest.fail("hours of work for nothing"))
    with pytest.raises(DataError, match="out exists"):
        build(user_folder, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"] and (out / "manifest.json").is_file()


def test_the_output_may_be_a_link_to_a_folder(user_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "shards")
    assert len(build(user_folder, tmp_path / "out")) == len(build(user_folder, tmp_path / "out", force=True)) == 11
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "shards" / "manifest.json").is_file()


@pytest.mark.parametrize("arguments", [["", "--out", "out"], ["mine", "--out", ""]])
def test_an_empty_path_is_refused_not_taken_for_the_working_directory(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="the path is empty"):
        main(["build", *arguments])
    with pytest.raises(ConfigError, match="the path is empty"):
        main(["inspect", ""])
