"""`ernie5 describe CONFIG`: the resolved configuration with its documentation and the model's counts. No torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ernie5.config.arguments import CommandParser, add_overrides
from ernie5.config.describe import describe_fields, describe_text
from ernie5.config.home import in_home
from ernie5.config.load import config_to_dict, load_config, peek_keys
from ernie5.config.registry import resolve
from ernie5.errors import EXIT_DONE
from ernie5.model.config import flops_per_token, num_active_params, num_params, param_counts
from ernie5.parallel.stages import plan_stages
from ernie5.train.config import RootConfig

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def main(argv: Sequence[str]) -> int:
    """Print the tree (text, or one JSON object with --json) and return 0. Raises ConfigError."""
    arguments = _parser().parse_intermixed_args(argv)
    kind = "tokenizer" if "tokenizer" in peek_keys(arguments.config) else "train"
    config = load_config(arguments.config, schema=resolve("root", name=kind), overrides=arguments.overrides)
    counts = model_counts(config) if isinstance(config, RootConfig) else {}
    if arguments.json:
        fields = [leaf.plain() for leaf in describe_fields(config)]
        print(json.dumps({"config": config_to_dict(config), **counts, "fields": fields}, indent=2, ensure_ascii=False))
    else:
        figures = _counts_text(config) + _stages_text(config) if isinstance(config, RootConfig) else ""
        print(describe_text(config) + figures, end="")
    return EXIT_DONE


def model_counts(config: RootConfig) -> dict[str, float]:
    """The figures other programs read: parameters, active parameters per text token, training FLOPs per token."""
    return {
        "num_params": num_params(config.model),
        "num_params_without_mtp": num_params(config.model, with_mtp=False),
        "num_active_params": num_active_params(config.model),
        "flops_per_token": flops_per_token(config.model, sequence_tokens=config.data.sequence_tokens),
    }


def short_count(count: float) -> str:
    """2447000000000 -> "2.447 T"."""
    for size, letter in UNITS:
        if count >= size:
            return f"{count / size:.4g} {letter}"
    return f"{count:g}"


def _counts_text(config: RootConfig) -> str:
    counts = model_counts(config)
    rows = dict(vars(param_counts(config.model)))
    rows["total"] = counts["num_params"]
    rows["without MTP"] = counts["num_params_without_mtp"]
    rows["active"] = counts["num_active_params"]
    lines = ["", "parameters"]
    lines += [f"  {name:<18}{count:>22,}  {short_count(count)}" for name, count in rows.items()]
    share = 100 * counts["num_active_params"] / counts["num_params_without_mtp"]
    lines[-1] += f" ({share:.2f} % of the total without MTP)"
    lines.append(f"training FLOPs per token at {config.data.sequence_tokens} tokens: {counts['flops_per_token']:.4g}")
    return "\n".join(lines) + "\n"


def _stages_text(config: RootConfig) -> str:
    """Which layers each pipeline stage would run; nothing without a pipeline."""
    parallel = config.parallel
    if parallel.pp == 1:
        return ""
    plan = plan_stages(config.model, pp=parallel.pp, vpp=parallel.vpp, stage_layers=parallel.stage_layers)
    return f"\n{plan.describe()}\n"


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="ernie5 describe",
        description="Print a resolved config: every value with its documentation, kind, default and the line it was "
        "set in, and the model's parameter and FLOP counts.",
        epilog="example: ernie5 describe configs/pretrain/quickstart.yaml model.layers=12",
    )
    parser.add_argument("config", type=in_home, metavar="CONFIG", help="a YAML file")
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object: config, counts, fields")
    return parser
