"""`ernie5 evaluate CKPT --data SHARDS [--json] [--out FILE]`: losses and the figures of "It learns"; or the logits of
given ids."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ernie5.checkpoint.names import find_checkpoint
from ernie5.config.arguments import CommandParser, add_setting, replace_settings
from ernie5.config.home import in_home
from ernie5.data.shards import list_shards, open_corpus
from ernie5.errors import EXIT_DONE, ConfigError
from ernie5.evaluate.config import EvaluateConfig
from ernie5.evaluate.figures import EVALUATION_NAME, Evaluation
from ernie5.evaluate.logits import write_logits
from ernie5.evaluate.report_figures import format_value
from ernie5.evaluate.runner import evaluate
from ernie5.evaluate.subject import Subject
from ernie5.generate.load import load_generation
from ernie5.generate.media import write_file
from ernie5.observe.log import say

OVERRIDES = ("loss_samples", "text_bytes", "caption_samples", "match_samples", "batch_rows", "guidance",
             "audio_guidance", "seed")


def build_parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = CommandParser(
        prog="ernie5 evaluate", description="Measure a checkpoint against baselines that are computed alongside."
    )
    parser.add_argument("checkpoint", type=in_home, help="checkpoint, folder of checkpoints, or run directory")
    parser.add_argument("--data", type=in_home, nargs="+", metavar="SHARDS", help="shards (default: those of the run)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--out", type=Path, help=f"where to write the JSON (default: {EVALUATION_NAME} of the run "
                        "directory, or beside a checkpoint that is in none)")
    parser.add_argument("--logits", type=Path, metavar="IDS.pt",
                        help="measure nothing; write the fp32 text logits [B, T, V] of these ids (a LongTensor [B, T], "
                        "torch.save) to --out")
    for name in OVERRIDES:
        kind = float if "guidance" in name else int
        option = name.replace("_", "-")
        add_setting(parser, option, schema=EvaluateConfig, field=name, kind=kind, section="evaluate")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code. Raises the errors of ernie5/errors.py."""
    options = build_parser().parse_args(argv)
    directory = find_checkpoint(options.checkpoint)
    if options.logits is not None:
        return _logits(options, directory=directory)
    corpus = open_corpus(list_shards(tuple(options.data))) if options.data else None
    loaded = load_generation(directory, device=options.device)
    chosen = vars(options)
    changes = {name: chosen[name] for name in OVERRIDES if chosen[name] is not None}
    config: EvaluateConfig = replace_settings(loaded.config.evaluate, changes=changes, section="evaluate")
    # Likeliest choices everywhere: a figure should not depend on the luck of a draw.
    greedy = dataclasses.replace(
        loaded.config.generate, temperature=0.0, beam=1, bit_temperature=0.0, audio_temperature=0.0,
        guidance=config.guidance, audio_guidance=config.audio_guidance, max_text_tokens=config.caption_tokens,
    )
    generation = loaded.generation.with_config(greedy)
    corpus = corpus or open_corpus(list_shards(loaded.config.data.shards))
    subject = Subject(generation, loaded.config.data, config, corpus)
    found = evaluate(subject, checkpoint=str(options.checkpoint), step=loaded.step, announce=_announce)
    path = options.out or _default_place(directory)
    say(found.to_json() if options.json else describe(found), stream=sys.stdout)  # a disk may refuse what took an hour
    write_file(path, content=found.to_json().encode("utf-8"))
    return EXIT_DONE


def _logits(options: argparse.Namespace, *, directory: Path) -> int:
    if options.out is None or options.data or options.json:
        raise ConfigError("ernie5 evaluate --logits IDS.pt goes with --out LOGITS.pt, without --data and --json")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logits = write_logits(directory, ids=options.logits, out=options.out, device=device)
    print(f"logits {list(logits.shape)} float32 of {directory}: {options.out}")
    return EXIT_DONE


def _announce(words: str) -> None:
    say(f"evaluating: {words}", stream=sys.stderr)  # `| head` ends the words, not the work


def _default_place(checkpoint: Path) -> Path:
    """RUN_DIR/evaluation.json for RUN_DIR/checkpoints/step-*, else beside the checkpoint."""
    parents = checkpoint.resolve().parents
    return (parents[1] if parents[0].name == "checkpoints" else parents[0]) / EVALUATION_NAME


def describe(evaluation: Evaluation) -> str:
    """A table for people."""
    lines = [f"step {evaluation.step}"]
    lines += [f"  validation loss {loss.modality:<6} {loss.nats:.4f} nats" for loss in evaluation.losses]
    for figure in evaluation.figures:
        mark = "reached" if figure.is_reached else "not yet"
        mark = mark if figure.is_goal else f"{mark}, no goal of this config"
        lines.append(
            f"  {figure.title:<46} {format_value(figure.value, figure.unit):>8}  {figure.baseline_name} "
            f"{format_value(figure.baseline, figure.unit)} {'' if figure.unit == '%' else figure.unit}  [{mark}]"
        )
    if evaluation.routing is not None:
        lines.append(f"  dead experts: {evaluation.routing.dead_experts}")
    lines += [f"  left out: {reason}" for reason in evaluation.skipped]
    lines.append(f"  {sum(timing.seconds for timing in evaluation.timings):.0f} s")
    return "\n".join(lines)
