"""`ernie5 data build`: a user's own files become shards, checked, counted and written all at once or not at all."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ernie5.data.config import BuildSections
from ernie5.data.decode import MediaInfo, probe_audio, probe_image, probe_video
from ernie5.data.lengths import SampleRuler
from ernie5.data.samples import Sample, split_of
from ernie5.data.shards import ShardWriter
from ernie5.data.sources import Scan, SourceFile, load_source, scan_folder
from ernie5.errors import ConfigError, DataError, EnvironmentFault
from ernie5.observe.faults import refusal_of
from ernie5.observe.progress import Progress
from ernie5.tokenizers.bundle import load_tokenizers

MANIFEST = "manifest.json"
FORMAT = 1
PROBLEMS_SHOWN = 8
LEFTOVER = re.compile(r"\.(?P<what>partial|replaced)-(?P<process>\d+)-[0-9a-f]{8}-(?P<host>.+)")


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What to build. compression: none, gzip, xz or packed.

    max_audio_seconds and max_video_frames: longest media. sections: the rows of training, which a sample with media
    must fit whole, and the tokenizers that say how much it takes."""

    source: Path
    out: Path
    language: str = "en"
    max_audio_seconds: float = 20.0
    max_video_frames: int = 17
    shard_mebibytes: float = 64.0
    compression: str = "none"
    force: bool = False
    skip_bad: bool = False
    progress: bool = True
    sections: BuildSections = dataclasses.field(default_factory=BuildSections)


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """What was built: shard names, samples per task, files that no rule recognised, bad files left out."""

    shards: tuple[str, ...]
    samples: dict[str, int]
    ignored: tuple[Path, ...]
    problems: tuple[str, ...]


def build_corpus(options: BuildOptions) -> BuildReport:
    """Read `options.source`, check every file, and write shards and a manifest to `options.out`.

    The output folder appears only when everything is written, and only then does `force` remove the old one. Raises
    ConfigError for a limit that is none, DataError when the folder exists already (unless `force`, and it holds nothing
    but what this command wrote), one DataError that names all files which cannot be used (unless `skip_bad`),
    EnvironmentFault where the disk refuses.
    """
    _check_limits(options)
    out = options.out.resolve()  # `.` gets its name, and a link goes on pointing where it does
    _remove_leftovers(out)
    _check_place(options)
    scan = scan_folder(options.source)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}-{_host()}")
    try:
        partial.mkdir(parents=True)
        report = _write_shards(scan, options=options, folder=partial)
        _check_place(options)  # again: another process may have written there meanwhile
        _put(partial, place=out)
    except OSError as error:
        raise EnvironmentFault(f"Cannot write {options.out}: {refusal_of(error, place='another --out')}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _check_limits(options: BuildOptions) -> None:
    limits = {
        "--shard-mebibytes": options.shard_mebibytes,
        "--max-audio-seconds": options.max_audio_seconds,
        "--max-video-frames": options.max_video_frames,
    }
    for option, value in limits.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{option} {value:g}: must be a number above 0. `ernie5 data build --help` explains it")


def _check_place(options: BuildOptions) -> None:
    """Raise DataError unless `out` is free, or `force` may replace it."""
    out = options.out
    if not out.exists():
        return
    if not options.force:
        raise DataError(f"the output folder {out} exists. Choose another one, or add --force to replace it.")
    foreign = sorted({path.name for path in out.iterdir()} - _own_files(out)) if out.is_dir() else [out.name]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise DataError(
            f"{out} was not written by `ernie5 data build`, or not by it alone ({foreign[0]}{more}), and --force "
            "replaces nothing else. Choose another --out, or remove it yourself."
        )


def _own_files(folder: Path) -> set[str]:
    """The manifest of an earlier build in `folder` and the shards that it lists; nothing where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        return {MANIFEST, *(shard["name"] for shard in manifest["shards"])} if manifest["format"] == FORMAT else set()
    except (OSError, ValueError, RecursionError, LookupError, TypeError):  # somebody else's manifest.json
        return set()


def _put(written: Path, *, place: Path) -> None:
    """Move the folder `written` to `place`; what stood there is removed once it is in place, and stays otherwise."""
    old = written.with_name(written.name.replace(".partial-", ".replaced-"))
    try:
        if place.exists():
            place.rename(old)
        written.rename(place)
    finally:
        if old.exists() and not place.exists():
            old.rename(place)
    if old.exists():
        shutil.rmtree(old)


def _remove_leftovers(out: Path) -> None:
    """Remove what builds of `out` that were killed on this host left beside it. The shards that one was about to
    replace get their name back if nothing has come into their place."""
    for path in out.parent.glob(f"{glob.escape(out.name)}.*"):
        match = LEFTOVER.fullmatch(path.name.removeprefix(out.name))
        if match is None or match["host"] != _host() or _is_running(int(match["process"])):
            continue
        if match["what"] == "replaced" and not out.exists():
            with contextlib.suppress(OSError):
                path.rename(out)
            continue
        shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    """Where the number of a process means that process: a host, and on Linux a container of it."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _write_shards(scan: Scan, *, options: BuildOptions, folder: Path) -> BuildReport:
    tally, gauge = _Tally(), _Gauge(options)
    problems = {path: [why] for path, why in scan.closed.items()}
    owners: dict[str, Path] = {}
    shards: list[Path] = []
    max_bytes = int(options.shard_mebibytes * 2**20)
    mode = "auto" if options.progress else "off"
    with Progress(len(scan.files), title="build", unit="file", mode=mode) as progress:
        for task, files in itertools.groupby(scan.files, key=lambda source: source.task):
            compression = _compression_of(task, chosen=options.compression)
            writer = ShardWriter(folder, prefix=task, max_bytes=max_bytes, compression=compression)
            with writer:
                for source in files:
                    for sample in _checked(source, gauge=gauge, owners=owners, problems=problems):
                        writer.write(sample)
                        tally.add(sample)
                    progress.advance()
            shards += writer.paths
    told = tuple(itertools.chain.from_iterable(problems.values()))
    if problems and not options.skip_bad:
        shown = " | ".join(told[:PROBLEMS_SHOWN])
        more = f" | and {len(told) - PROBLEMS_SHOWN} more" if len(told) > PROBLEMS_SHOWN else ""
        counts = f"{len(problems)} of {len(scan.files) + len(scan.closed)} files cannot be used"
        raise DataError(f"{counts} (--skip-bad leaves them out): {shown}{more}")
    if not tally.samples:
        raise DataError(f"no sample is left of {len(scan.files)} files: {' | '.join(told[:PROBLEMS_SHOWN])}")
    (folder / MANIFEST).write_text(json.dumps(tally.manifest(shards), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return BuildReport(tuple(p.name for p in shards), dict(tally.samples), scan.ignored, told)


def _compression_of(task: str, *, chosen: str) -> str:
    """`packed` means what is small for its task: xz saves a fifth of text, but 4 % of media, and unpacks slowly."""
    if chosen != "packed":
        return chosen
    return "xz" if task in ("text", "page") else "gzip"


def _checked(
    source: SourceFile, *, gauge: _Gauge, owners: dict[str, Path], problems: dict[Path, list[str]]
) -> Iterator[Sample]:
    """The samples of one file that fit, whose keys `owners` takes; what does not is added to its `problems`."""
    try:
        for sample in load_source(source, language=gauge.options.language):
            if isinstance(sample, Sample) and sample.key in owners:  # a line of a.jsonl is a-000000: so may a file be
                first = owners[sample.key]
                sample = DataError(f"{first} and {source.path} give the same key {sample.key}. Rename one of them.")
            if isinstance(sample, DataError):
                problems.setdefault(source.path, []).append(str(sample))
                continue
            owners[sample.key] = source.path
            yield gauge.measure(sample, name=str(source.path))
    except (DataError, OSError) as error:
        problems.setdefault(source.path, []).append(str(error))


class _Gauge:
    """Decodes every medium once, and refuses what cannot be read or cannot fit a row. Tokenizers are loaded when the
    first medium comes."""

    def __init__(self, options: BuildOptions) -> None:
        self.options = options

    @functools.cached_property
    def _ruler(self) -> SampleRuler:
        sections = self.options.sections
        return SampleRuler(sections.data, tokenizers=load_tokenizers(sections.tokenizers))

    def measure(self, sample: Sample, *, name: str) -> Sample:
        """The sample with the length of its media; DataError naming the file `name`."""
        info = MediaInfo()
        for media in sample.media:
            if sample.meta.task == "audio":
                info = probe_audio(media.data, name=name)
            elif sample.meta.task == "video":
                info = probe_video(media.data, name=name, max_frames=self.options.max_video_frames)
            else:
                probe_image(media.data, name=name)
        self._check_limits(sample, info=info, name=name)
        if sample.media:
            self._check_row(sample, info=info, name=name)
        seconds = None if info.seconds is None else round(info.seconds, 3)
        return dataclasses.replace(sample, meta=dataclasses.replace(sample.meta, seconds=seconds, frames=info.frames))

    def _check_limits(self, sample: Sample, *, info: MediaInfo, name: str) -> None:
        most_seconds, most_frames = self.options.max_audio_seconds, self.options.max_video_frames
        if sample.meta.task == "audio" and info.seconds > most_seconds:
            raise DataError(
                f"{name} lasts {info.seconds:.1f} s; a sample may last {most_seconds:g} s at most. Cut it, or raise "
                f"--max-audio-seconds (and --sequence-tokens with it)."
            )
        if sample.meta.task == "video" and info.frames > most_frames:
            raise DataError(
                f"{name} has more than {most_frames} frames. Cut it into clips and lower its rate, for instance "
                f"`ffmpeg -i IN -vf fps=8 -frames:v {most_frames} OUT.mp4`, or raise --max-video-frames."
            )

    def _check_row(self, sample: Sample, *, info: MediaInfo, name: str) -> None:
        row = self.options.sections.data.sequence_tokens
        need = self._ruler.longest(sample.meta, seconds=info.seconds)
        if need is not None and need.positions > row:
            subject = f"{name}: a picture" if need.task == "page" else name
            raise DataError(
                f"{subject} takes {need.positions} positions as {need.task} ({need.words} of its words), but a row has "
                f"{row}, and media are never split. Cut it or shorten its words, or build with --sequence-tokens "
                f"{need.positions} and train with data.sequence_tokens at least as long."
            )


class _Tally:
    """Counts for the manifest."""

    def __init__(self) -> None:
        self.samples: collections.Counter[str] = collections.Counter()
        self.splits: collections.Counter[str] = collections.Counter()
        self.languages: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()

    def add(self, sample: Sample) -> None:
        """Count one sample."""
        meta = sample.meta
        self.samples[meta.task] += 1
        self.splits[f"{meta.task}/{meta.split or split_of(sample.key)}"] += 1
        self.languages[f"{meta.task}/{meta.language}"] += 1
        if meta.seconds is not None:
            self.seconds[meta.task] += meta.seconds

    def manifest(self, shards: list[Path]) -> dict:
        """What stands in manifest.json."""
        return {
            "format": FORMAT,
            "samples": dict(sorted(self.samples.items())),
            "splits": dict(sorted(self.splits.items())),
            "languages": dict(sorted(self.languages.items())),
            "seconds": {task: round(seconds, 1) for task, seconds in sorted(self.seconds.items())},
            "shards": [_shard_entry(path) for path in shards],
        }


def _shard_entry(path: Path) -> dict:
    data = path.read_bytes()
    return {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
