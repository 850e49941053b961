"""`ernie5 convert SRC DST --to FORMAT`."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

from ernie5.config.arguments import CommandParser
from ernie5.errors import EXIT_DONE, ConfigError

UNITS = (("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1), ("", 1))
LARGEST_SHARD = "5GB"
DTYPES = (("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32"))


def build_parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    from ernie5.checkpoint.convert.request import ALIASES, FORMATS

    parser = CommandParser(
        prog="ernie5 convert",
        description="Carry a model into another format. The source's format is found out; a killed conversion goes on "
        "with the same command.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint, run directory, or model directory")
    parser.add_argument("target", type=Path, metavar="DST", help="directory to write, there once it is whole")
    parser.add_argument(
        "--to", required=True, choices=(*FORMATS, *(alias for alias, _ in ALIASES)), dest="format",
        help="ernie45-hf: transformers and the hub; ernie45-paddle (paddle): PaddleFormers; ernie5: a checkpoint of "
        "ours; ernie45-vl: the text part of an Ernie4_5_VLMoe; ernie5-hf: the whole model with its own code for "
        "AutoModelForCausalLM; upcycle: dense to experts",
    )
    parser.add_argument("--dtype", choices=[name for name, _ in DTYPES],
                        help="dtype of the weights (default: as stored); routers and their bias stay fp32")
    parser.add_argument("--shard-size", metavar="SIZE", help="largest file of a foreign format (default: 5GB)")
    parser.add_argument("--masters", action="store_true", help="take the optimizer's fp32 masters for bf16 weights")
    parser.add_argument("--text-only", action="store_true", help="leave out embeddings and heads of other modalities")
    parser.add_argument("--force", action="store_true", help="replace DST if it is a model")
    parser.add_argument("--into", type=Path, metavar="VL_DIR", help="ernie45-vl: the model whose text part is replaced")
    parser.add_argument("--expert-width", type=int, metavar="N", help="upcycle: SwiGLU width of one expert")
    parser.add_argument("--copies", type=int, metavar="N", help="upcycle: experts per slice (default: 1)")
    parser.add_argument("--dense-layers", type=int, metavar="N", help="upcycle: layers that stay dense (default: 0)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code. Raises CheckpointError, ConfigError or EnvironmentFault."""
    from ernie5.checkpoint.convert.request import ALIASES, Request, convert
    from ernie5.checkpoint.convert.upcycle import Upcycling

    options = build_parser().parse_args(argv)
    name = dict(ALIASES).get(options.format, options.format)
    shard_bytes = parse_size(options.shard_size or LARGEST_SHARD)
    _refuse_unused(options, name=name)
    upcycling = None
    if options.expert_width is not None:
        copies = 1 if options.copies is None else options.copies
        upcycling = Upcycling(options.expert_width, copies, options.dense_layers or 0)
    start = time.monotonic()
    report = convert(
        Request(
            source=options.source, target=options.target, format=name, dtype=dict(DTYPES).get(options.dtype),
            shard_bytes=shard_bytes, masters=options.masters, text_only=options.text_only,
            force=options.force, upcycling=upcycling, into=options.into,
        )
    )
    again = f", {report.resumed_tensors} of them already there" if report.resumed_tensors else ""
    print(
        f"{report.source_format} -> {name}: {report.num_tensors} tensors{again}, {report.num_bytes / 1e9:.3f} GB in "
        f"{time.monotonic() - start:.1f} s: {options.target}"
    )
    for note in report.notes:
        print(f"note: {note}")
    return EXIT_DONE


def _refuse_unused(options: argparse.Namespace, *, name: str) -> None:
    """Raise ConfigError for an option that the target does not know: it would be left out in silence."""
    from ernie5.checkpoint.convert.request import HUB, PADDLE, REMOTE, UPCYCLE, VL_FORMAT

    owners = (
        (("expert_width", "copies", "dense_layers"), (UPCYCLE,)),
        (("into",), (VL_FORMAT,)),
        (("shard_size",), (HUB, PADDLE, VL_FORMAT, REMOTE)),
    )
    for keys, formats in owners:
        for key in keys:
            if vars(options)[key] is not None and name not in formats:
                raise ConfigError(
                    f"--{key.replace('_', '-')} belongs to --to {' or '.join(formats)}, not to --to {name}. Leave it "
                    "out"
                )


def parse_size(text: str) -> int:
    """Bytes of "5GB", "300MB" or a plain number. Raises ConfigError for anything else and for 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|MB|KB|B|)", text.strip().upper())
    size = int(float(match[1]) * dict(UNITS)[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"--shard-size {text!r}: expected a size such as 5GB or 300MB")
    return size
