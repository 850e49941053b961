"""`ernie5 tokenizer train CONFIG [a.b=c ...] --out DIR`: train a text, visual or audio tokenizer."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Sequence
from pathlib import Path

from ernie5.config.arguments import CommandParser, add_overrides
from ernie5.config.home import in_home
from ernie5.config.load import load_config, peek_keys
from ernie5.errors import EXIT_DONE, ConfigError, EnvironmentFault
from ernie5.observe.faults import refusal_of
from ernie5.tokenizers.config import TokenizerRunConfig

if typing.TYPE_CHECKING:
    import torch


def main(argv: Sequence[str]) -> int:
    """Run the verb and return the exit code. Raises Ernie5Error for anything the user can act on."""
    arguments = _parser().parse_intermixed_args(argv)
    if "tokenizer" not in peek_keys(arguments.config) and "model" in peek_keys(arguments.config):
        raise ConfigError(
            f"{arguments.config} configures a pretraining run. Run it with `ernie5 train {arguments.config}`; "
            "tokenizers are trained from a file with the section `tokenizer`, such as configs/tokenizer/visual.yaml"
        )
    config = load_config(arguments.config, schema=TokenizerRunConfig, overrides=tuple(arguments.overrides))
    out = Path(arguments.out if arguments.out else f"runs/tokenizer_{config.tokenizer.kind}")
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the work: what takes no files would be told after it
        if config.tokenizer.kind == "text":
            _train_text(config, out=out)
        else:
            _train_codec(config, out=out, progress=not arguments.quiet)
    except (OSError, RuntimeError) as error:
        refusal = refusal_of(error, place="another --out")
        if refusal is None or isinstance(error, BrokenPipeError):
            raise
        raise EnvironmentFault(f"Cannot write {out}: {refusal}.") from error
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="ernie5 tokenizer",
        description="Train a tokenizer; the same command continues a run that was stopped.",
    )
    parser.add_argument("action", choices=("train",))
    parser.add_argument(
        "config", type=in_home, metavar="CONFIG", help="YAML, for example configs/tokenizer/visual.yaml"
    )
    add_overrides(parser)
    parser.add_argument(
        "--out", type=in_home, metavar="DIR", help="where everything is written (default runs/tokenizer_KIND)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _train_codec(config: TokenizerRunConfig, *, out: Path, progress: bool) -> None:
    import torch

    from ernie5.train.codec import computes_in_bf16, train_codec

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if config.tokenizer.kind == "visual":
        from ernie5.train.codec_visual import build_visual_task

        task = build_visual_task(config, device=_choose_device(config.train.device))
    else:
        from ernie5.train.codec_audio import build_audio_task

        task = build_audio_task(config)
    device = next(task.codec.parameters()).device
    if config.train.precision == "bf16" and not computes_in_bf16(config.train, device=device):
        print("train.precision = bf16, but this processor does not multiply bf16 by itself: fp32 is faster, and taken")
    facts = train_codec(task, config=config.train, out=out, progress=progress)
    figures = ", ".join(f"{name} {value:.2f}" for name, value in facts.quality.items())
    print(f"{facts.steps} steps, {facts.minutes:.1f} minutes: {figures}")
    print(f"The tokenizer is in {out / 'export'}", flush=True)


def _choose_device(name: str) -> torch.device:
    """Raises EnvironmentFault where a GPU is asked for and absent."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault("train.device = cuda, but torch sees no GPU. Set train.device: auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _train_text(config: TokenizerRunConfig, *, out: Path) -> None:
    from ernie5.train.text_vocabulary import train_text_vocabulary

    print(train_text_vocabulary(config, out=out), file=sys.stdout, flush=True)
