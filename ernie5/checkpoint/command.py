"""`ernie5 inspect CKPT`: what is in a checkpoint, and how its configuration differs from another's. No torch."""

from __future__ import annotations

import json
from pathlib import Path

from ernie5.checkpoint.manifest import Manifest, read_manifest
from ernie5.checkpoint.names import CONFIG_FILE, find_checkpoint, is_optimizer_file
from ernie5.config.arguments import CommandParser
from ernie5.config.base import Config
from ernie5.config.load import config_to_dict, load_config
from ernie5.config.registry import resolve


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = CommandParser(prog="ernie5 inspect", description="Show what a checkpoint holds.")
    parser.add_argument("checkpoint", help="checkpoint, folder of checkpoints, or run directory")
    parser.add_argument("--against", metavar="CKPT", help="another checkpoint whose configuration is compared")
    parser.add_argument("--optimizer", action="store_true", help="list the optimizer's tensors too")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    arguments = parser.parse_args(argv)
    directory = find_checkpoint(arguments.checkpoint)
    manifest = read_manifest(directory)
    if arguments.json:
        print(manifest.to_json(), end="")
        return 0
    print(describe(directory, manifest=manifest, with_optimizer=arguments.optimizer))
    if arguments.against:
        print(compare_configs(directory, other=find_checkpoint(arguments.against)))
    return 0


def describe(directory: Path, *, manifest: Manifest, with_optimizer: bool) -> str:
    """Step, files, tokenizers and the tree of tensors with shapes, dtypes and sizes."""
    lines = [
        f"{directory}",
        f"step {manifest.step}, {manifest.tokens:,} tokens, precision {manifest.precision}",
        *(f"file {name}: {_size(file.num_bytes)}, sha256 {file.sha256[:16]}" for name, file in manifest.files.items()),
        *(f"tokenizer {name}: {identity[:16]}" for name, identity in manifest.tokenizers.items()),
    ]
    shown = {k: v for k, v in manifest.tensors.items() if with_optimizer or not any(map(is_optimizer_file, v.files))}
    width = max((len(name) for name in shown), default=0)
    for name, entry in shown.items():
        shape = "x".join(map(str, entry.shape)) or "scalar"
        slices = f"  in {len(entry.slices)} slices" if len(entry.slices) > 1 else ""
        lines.append(f"  {name:<{width}}  {entry.dtype:<5} {shape:<20} {_size(entry.num_bytes)}{slices}")
    total = sum(entry.num_bytes for entry in shown.values())
    lines.append(f"{len(shown)} tensors, {_size(total)}")
    return "\n".join(lines)


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


def _size(num_bytes: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
