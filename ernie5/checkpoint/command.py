"""`ernie5 inspect CKPT`: what is in a checkpoint, and how its configuration differs from another's. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from ernie5.checkpoint.manifest import Manifest, read_manifest
from ernie5.checkpoint.names import CONFIG_FILE, find_checkpoint, is_optimizer_file
from ernie5.checkpoint.tree import grow_tree, size_words, tree_lines
from ernie5.config.arguments import CommandParser
from ernie5.config.base import Config
from ernie5.config.home import in_home
from ernie5.config.load import config_to_dict, load_config
from ernie5.config.registry import resolve


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = CommandParser(prog="ernie5 inspect", description="Show what a checkpoint holds.")
    parser.add_argument("checkpoint", type=in_home, help="checkpoint, folder of checkpoints, or run directory")
    parser.add_argument(
        "--against", type=in_home, metavar="CKPT", help="another checkpoint whose configuration is compared"
    )
    parser.add_argument("--optimizer", action="store_true", help="list the optimizer's tensors too")
    parser.add_argument("--depth", type=int, metavar="N", help="show N levels of the tree (default: all)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    arguments = parser.parse_args(argv)
    if arguments.depth is not None and arguments.depth < 1:
        parser.error(f"--depth {arguments.depth} shows nothing: give 1 or more")
    directory = find_checkpoint(arguments.checkpoint)
    other = find_checkpoint(arguments.against) if arguments.against else None
    manifest = read_manifest(directory)
    if arguments.json:
        print(manifest.to_json(), end="")
        return 0
    print(describe(directory, manifest=manifest, with_optimizer=arguments.optimizer, depth=arguments.depth))
    if other is not None:
        print(compare_configs(directory, other=other))
    return 0


def describe(directory: Path, *, manifest: Manifest, with_optimizer: bool, depth: int | None = None) -> str:
    """Step, files, tokenizers and the tree of tensors, `depth` levels of it, with shapes, dtypes and sizes."""
    lines = [
        f"{directory}",
        f"step {manifest.step}, {manifest.tokens:,} tokens, precision {manifest.precision}",
        *(f"file {n}: {size_words(file.num_bytes)}, sha256 {file.sha256[:16]}" for n, file in manifest.files.items()),
        *(f"tokenizer {name}: {identity[:16]}" for name, identity in manifest.tokenizers.items()),
    ]
    shown = {k: v for k, v in manifest.tensors.items() if with_optimizer or not any(map(is_optimizer_file, v.files))}
    root = grow_tree(shown)
    total = f"{root.tensors} tensors, {root.values:,} values, {size_words(root.num_bytes)}"
    hidden = len(manifest.tensors) - len(shown)
    more = f"; {hidden} of the optimizer are not shown (--optimizer)" if hidden else ""
    return "\n".join([*lines, *tree_lines(root, depth=depth), total + more])


def compare_configs(directory: Path, *, other: Path) -> str:
    """One line per key that differs between the configurations of two checkpoints."""
    schema = resolve("root", name="train")
    left = flatten(load_config(directory / CONFIG_FILE, schema=schema))
    right = flatten(load_config(other / CONFIG_FILE, schema=schema))
    keys = [key for key in sorted({*left, *right}) if left.get(key) != right.get(key)]
    lines = [f"  {key}: {json.dumps(left.get(key))} -> {json.dumps(right.get(key))}" for key in keys]
    return "\n".join([f"configuration: {len(keys)} differences from {directory} to {other}", *lines])


def flatten(config: Config) -> dict[str, object]:
    """Dotted keys of a configuration with their plain values."""
    result: dict[str, object] = {}

    def visit(values: dict[str, object], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{key}.")
            else:
                result[prefix + key] = value

    visit(config_to_dict(config), "")
    return result
