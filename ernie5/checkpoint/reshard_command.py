"""`ernie5 reshard SRC DST`: the same checkpoint in other files."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ernie5.checkpoint.names import CONFIG_FILE, find_checkpoint
from ernie5.config.arguments import CommandParser
from ernie5.config.load import load_config
from ernie5.config.registry import resolve
from ernie5.errors import EXIT_DONE, ConfigError, LayoutError
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.stages import plan_stages

AXES = ("dp", "tp", "cp", "ep", "etp", "pp", "vpp")


def build_parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = CommandParser(
        prog="ernie5 reshard",
        description="Write a checkpoint in other files: one (the default), N of about equal size, or those that the "
        "ranks of a layout would write. Training under any layout reads all of them; values do not change by a bit. "
        "DST stands once it is whole; a killed call is repeated.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint, folder of checkpoints, or run directory")
    parser.add_argument("target", type=Path, metavar="DST", help="the new checkpoint, a directory")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--files", type=int, default=1, metavar="N", help="N model files and N optimizer files")
    chosen.add_argument("--layout", metavar="AXES", help="degrees such as dp=2,tp=2,ep=4: a file of each per rank")
    parser.add_argument("--force", action="store_true", help="replace DST if it is a checkpoint")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code. Raises CheckpointError, ConfigError or EnvironmentFault."""
    options = build_parser().parse_args(argv)
    if options.files < 1:
        raise ConfigError(f"--files {options.files}: at least one file is needed")
    from ernie5.checkpoint.reshard import LayoutPlan, reshard

    start = time.monotonic()
    ranks, plan = options.files, None
    if options.layout is not None:
        with _said_of_the_option():
            degrees = parse_layout(options.layout)
            config = load_config(find_checkpoint(options.source) / CONFIG_FILE, schema=resolve("root", name="train"))
            degrees.check_model(config.model)
            world_size = (degrees.dp or 1) * degrees.model_ranks
            dims = degrees.derive_dims(world_size, kv_heads=config.model.kv_heads)
            stages = plan_stages(config.model, pp=degrees.pp, vpp=degrees.vpp)
        ranks, plan = dims.world_size, LayoutPlan(dims, stages)
    manifest = reshard(options.source, target=options.target, ranks=ranks, plan=plan, force=options.force)
    total = sum(entry.num_bytes for entry in manifest.files.values())
    print(
        f"{options.target}: {len(manifest.tensors)} tensors of step {manifest.step} in {len(manifest.files)} files, "
        f"{total / 1e9:.3f} GB, in {time.monotonic() - start:.1f} s"
    )
    return EXIT_DONE


@contextlib.contextmanager
def _said_of_the_option() -> Iterator[None]:
    """The rules of layouts speak of the settings of a run; here the degrees are those of --layout."""
    try:
        yield
    except LayoutError as error:
        text = str(error).replace(f"{ParallelConfig.__name__}.", "--layout ")
        raise LayoutError(text.replace("parallel.", "--layout ")) from None


def parse_layout(text: str) -> ParallelConfig:
    """Degrees out of `dp=2,tp=2`. Raises ConfigError or LayoutError for what is no layout of this version."""
    degrees: dict[str, int] = {"dp": 1}
    for item in text.split(","):
        name, _, value = item.strip().partition("=")
        if name not in AXES or not value.isdigit() or int(value) < 1:
            raise ConfigError(
                f"--layout {text!r}: {item.strip()!r} is no degree. Give some of {', '.join(AXES)} with numbers from 1 "
                "on, such as dp=2,tp=2,ep=4"
            )
        degrees[name] = int(value)
    return ParallelConfig(**degrees)
