"""Compare a mixture-of-experts layer or a whole training step with transformers' models on this CPU.

  python tools/bench_peers/main.py layer|step S|M|X [--rounds 3] [--threads 2] [--out FILE.json] [--layers N]

First the gate: with the same weights our layer must give the peer's output and gradient. Then rounds in which every
contestant runs once; ratios are medians over rounds. bench_step races whole steps one pair at a time, bench_kernels the
kernels one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Callable

import torch
from arguments import at_least, file, num_threads
from gate import gate_layer
from measure import HEADER, race
from ours import build_layer, build_step, layer_inputs
from packages import PACKAGES, build_package_layer
from peers import FAMILIES, IMPLEMENTATIONS, build_peer_layer, build_peer_step, possible
from shapes import ROW_TOKENS, SHAPES, VOCABULARY, Shape


def layer_contestants(
    shape: Shape, *, kinds: tuple[str, ...], only: str, packages: tuple[str, ...]
) -> dict[str, Callable[[], object]]:
    """Forward and backward of one layer, ours first; `only` limits families to one, `packages` are raced too."""
    found: dict[str, Callable[[], object]] = {}
    inputs = layer_inputs(shape)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(shape.tokens // ROW_TOKENS, ROW_TOKENS, shape.width).to(dtype).requires_grad_()
        upstream, suffix = torch.randn(x.shape).to(dtype), str(dtype).removeprefix("torch.")
        layers = {f"ours {suffix}": build_layer(shape, dtype=dtype)}
        for family in (f for f in FAMILIES if only in ("", f)):
            for kind in (k for k in kinds if possible(shape, implementation=k, dtype=dtype)):
                layers[f"{family} {kind} {suffix}"] = build_peer_layer(
                    family, shape=shape, implementation=kind, dtype=dtype
                )
        for package in packages:
            layers[f"{package} {suffix}"] = build_package_layer(package, shape=shape, dtype=dtype)
        for name, layer in layers.items():
            is_ours = name.startswith("ours")

            def run(layer=layer, is_ours=is_ours, x=x, upstream=upstream) -> None:
                out = layer(x, inputs=inputs)[0] if is_ours else layer(x)
                out.backward(upstream)
                layer.zero_grad(set_to_none=True)
                x.grad = None

            found[name] = run
    return found


def step_contestants(shape: Shape, *, kinds: tuple[str, ...], only: str) -> dict[str, Callable[[], object]]:
    """Whole steps with the optimizer, ours first; `only` limits families to one (memory)."""
    ids = torch.randint(0, VOCABULARY, (shape.tokens // ROW_TOKENS, ROW_TOKENS))
    found = {f"ours {p}": build_step(shape, precision=p, ids=ids) for p in ("bf16", "fp32")}
    for family in (f for f in FAMILIES if only in ("", f)):
        for dtype in (torch.bfloat16, torch.float32):
            for kind in (k for k in kinds if possible(shape, implementation=k, dtype=dtype)):
                found[f"{family} {kind} {str(dtype).removeprefix('torch.')}"] = build_peer_step(
                    family, shape=shape, implementation=kind, dtype=dtype, ids=ids
                )
    return found


def main() -> None:
    """Parse, gate, race, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer", "step"))
    parser.add_argument("shape", nargs="?", default="S", choices=tuple(SHAPES))
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--threads", type=num_threads, default=2)
    parser.add_argument("--tokens", type=at_least(ROW_TOKENS, multiple=ROW_TOKENS), default=0,
                        help="instead of the shape's, in rows of 1,024")
    parser.add_argument("--layers", type=at_least(1), default=0, help="instead of the shape's, where memory is short")
    parser.add_argument("--kinds", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--family", default="", choices=tuple(FAMILIES), help="one family of peers alone")
    parser.add_argument("--packages", nargs="+", default=(), choices=tuple(PACKAGES),
                        help="expert layers of other packages, beside `layer`'s transformers, without a gate")
    parser.add_argument("--out", type=file, help="FILE.json")
    arguments = parser.parse_args()
    if arguments.what == "layer" and arguments.layers:
        parser.error(f"`layer` races one layer. Leave out --layers {arguments.layers}, or race a `step`")
    for package in (PACKAGES[name] for name in arguments.packages):
        if arguments.what == "step":
            parser.error("--packages have a layer, no step")
        if not package.is_here:
            parser.error(f"{package.module} is not installed here: {package.install}")
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    shape = dataclasses.replace(
        shape, tokens=arguments.tokens or shape.tokens, layers=arguments.layers or shape.layers
    )
    gate_layer(shape)
    kinds = tuple(arguments.kinds)
    if arguments.what == "layer":
        contestants = layer_contestants(shape, kinds=kinds, only=arguments.family, packages=tuple(arguments.packages))
    else:
        contestants = step_contestants(shape, kinds=kinds, only=arguments.family)
    flops = shape.layer_flops if arguments.what == "layer" else shape.step_flops
    timings = race(contestants, flops=flops, rounds=arguments.rounds)
    print(f"{arguments.what} {shape}, {arguments.threads} threads, {platform.processor() or platform.machine()}")
    print(HEADER, *(t.row(ours=timings[0]) for t in timings), sep="\n")
    if arguments.out:
        arguments.out.write_text(json.dumps([dataclasses.asdict(t) for t in timings], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
