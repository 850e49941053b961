"""The verbs `ernie5 data build` and `ernie5 data inspect`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ernie5.config.arguments import CommandParser
from ernie5.config.home import in_home

BUILD_RULES = """
what becomes a sample (folders and links are followed; hidden files and folders are left out):
  a.txt a.md a.html          one text document (Markdown and html with local pictures: one interleaved page)
  a.jsonl                    one text document per line: {"text": "...", "language": "en"}
  a.png|jpg|webp + a.txt     picture with its caption; or a.json: {"captions": [{"language": "en", "text": "..."}],
                             "keywords": [...], "group": "...", "subgroup": "..."}
  a.mp4|webm|mkv|mov + a.txt clip with its caption (a.json as above, also "motion")
  a.wav|flac|ogg|opus|mp3 + a.txt  speech with its transcript; or a.json: {"transcript": "...", "language": "en"}
  folder/page.json           one page: {"segments": [{"text": "..."}, {"image": "figure.png"}]}
a sample with media must fit a training row whole; text may be of any length, rows continue it.
5 % of the samples, chosen by their key, are validation; "split" in a json overrides it.
"""


def main(argv: list[str]) -> int:
    """Run `ernie5 data ...`; returns the exit code. Errors of the user are raised as DataError."""
    arguments = _make_parser().parse_args(argv)
    return _run_build(arguments) if arguments.verb == "build" else _run_inspect(arguments)


def _make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="ernie5 data", description="Build shards from files, or look into shards.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser(
        "build",
        help="turn a folder of files into shards",
        description="Turn a folder of files into WebDataset shards and a manifest.",
        epilog=BUILD_RULES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("source", type=Path, metavar="SRC", help="folder with the files")
    build.add_argument("--out", type=Path, required=True, help="folder for the shards; must not exist")
    build.add_argument("--language", default="en", help="language of files that do not say theirs (default: en)")
    build.add_argument("--max-audio-seconds", type=float, default=20.0, help="longer sound is an error (default: 20)")
    build.add_argument("--max-video-frames", type=int, default=17, help="longer clips are an error (default: 17)")
    build.add_argument(
        "--sequence-tokens", metavar="N",
        help="positions of a training row; a sample with media that needs more is an error (default: "
        "data.sequence_tokens of --config, else 512)",
    )
    build.add_argument(
        "--config", type=Path, metavar="CONFIG",
        help="training config whose data.* (rows, sizes of media, shares of tasks) and tokenizers.* say what fits",
    )
    build.add_argument("--shard-mebibytes", type=float, default=64.0, help="size of a shard, unpacked (default: 64)")
    build.add_argument(
        "--compress",
        choices=("none", "gzip", "xz", "packed"),
        default="none",
        help="pack whole shards (packed: xz for text and pages, the quicker gzip for media); they are then read into "
        "memory, so only for small corpora (default: none)",
    )
    build.add_argument("--force", action="store_true", help="replace an output folder that this command wrote")
    build.add_argument("--skip-bad", action="store_true", help="leave unusable files out, and name them")
    build.add_argument("--quiet", action="store_true", help="no progress bar")
    inspect = verbs.add_parser("inspect", help="count and show samples", description="Count and show samples.")
    inspect.add_argument(
        "shards", type=in_home, nargs="+", help="shards, globs, folders, or the word sample (the embedded corpus)"
    )
    inspect.add_argument("--samples", type=int, default=1, metavar="N", help="samples shown per task (default: 1)")
    inspect.add_argument("--split", choices=("train", "validation"), help="only this part")
    inspect.add_argument("--decode", action="store_true", help="decode every medium and name those that fail")
    inspect.add_argument("--json", action="store_true", help="print one json object instead of a table")
    return parser


def _run_build(arguments: argparse.Namespace) -> int:
    from ernie5.config.load import load_sections
    from ernie5.data.build import BuildOptions, build_corpus  # loads torch and the media libraries
    from ernie5.data.config import BuildSections

    rows = () if arguments.sequence_tokens is None else (f"data.sequence_tokens={arguments.sequence_tokens}",)
    sections = load_sections(arguments.config, schema=BuildSections, overrides=rows)
    report = build_corpus(
        BuildOptions(
            source=arguments.source,
            out=arguments.out,
            language=arguments.language,
            max_audio_seconds=arguments.max_audio_seconds,
            max_video_frames=arguments.max_video_frames,
            shard_mebibytes=arguments.shard_mebibytes,
            compression=arguments.compress,
            force=arguments.force,
            skip_bad=arguments.skip_bad,
            progress=not arguments.quiet,
            sections=sections,
        )
    )
    counts = ", ".join(f"{count} {task}" for task, count in sorted(report.samples.items()))
    print(f"{arguments.out}: {len(report.shards)} shard(s), {counts}")
    for problem in report.problems:
        print(f"left out: {problem}", file=sys.stderr)
    if report.ignored:
        names = ", ".join(str(path.relative_to(arguments.source)) for path in report.ignored[:5])
        print(f"not recognised: {len(report.ignored)} file(s), first {names}", file=sys.stderr)
    return 0


def _run_inspect(arguments: argparse.Namespace) -> int:
    from ernie5.data.inspect import describe_corpus, print_description

    description = describe_corpus(
        tuple(arguments.shards), split=arguments.split, samples=arguments.samples, decode=arguments.decode
    )
    print_description(description, as_json=arguments.json)
    return 0
