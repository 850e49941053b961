"""Measure what the layers keep for backward, and the peak, with and without recompute, beside what theory says.

    OMP_NUM_THREADS=1 .venv/bin/python tools/activation_memory.py 1024 native
Counts the bytes of live tensors that the pass allocates (fp32, one process, text alone), not the process's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).with_name("bench_peers")))

from arguments import at_least
from live_bytes import LiveBytes

from ernie5.engine.config import EngineConfig
from ernie5.engine.recompute import install_recompute
from ernie5.model.backbone import build_model
from ernie5.model.config import ModelConfig, MoEConfig, MTPConfig

MODEL = ModelConfig(layers=6, width=128, query_heads=4, kv_heads=2, head_width=32, modalities=("text",),
                    mtp=MTPConfig(depth=0), moe=MoEConfig(num_experts=32, top_k=4, expert_width=64))
MODES = {
    "none": EngineConfig(),
    "selective: experts": EngineConfig(recompute="selective", recompute_parts=("experts",)),
    "selective: attention": EngineConfig(recompute="selective", recompute_parts=("attention",)),
    "selective: experts, attention": EngineConfig(recompute="selective"),
    "full": EngineConfig(recompute="full"),
}


def theory_bytes(engine: EngineConfig, *, tokens: int, native: bool) -> int:
    """What one layer keeps; the last one's output comes on top."""
    if engine.recompute == "full":
        return 4 * tokens * MODEL.width
    moe, width, parts = MODEL.moe, MODEL.width, engine.recomputed_parts
    heads, keys = MODEL.query_heads * MODEL.head_width, MODEL.kv_heads * MODEL.head_width
    # norm's output, products before and after norm and rotation, values, output
    attention = 0 if "attention" in parts else width + 2 * (heads + keys) + keys + heads
    # per choice: rows, both halves before and one after the activation; C++ keeps both halves alone
    per_choice = 2 * moe.expert_width if native else width + 3 * moe.expert_width
    experts = 0 if "experts" in parts else moe.top_k * per_choice
    scores = moe.top_k if native else moe.num_experts  # C++ keeps the chosen ones
    return 4 * tokens * (attention + experts + 3 * width + scores)  # two residuals, what the second norm gives


def measure(engine: EngineConfig, *, tokens: int, native: bool) -> tuple[int, int]:
    """Bytes kept after forward, and the peak until the end of backward."""
    kernels = "auto" if native else "torch"
    model = build_model(dataclasses.replace(MODEL, expert_backend=kernels, attention_backend=kernels), seed=0)
    install_recompute(model, engine=engine, device=torch.device("cpu"))
    hidden = torch.randn(1, tokens, MODEL.width, requires_grad=True)
    positions = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1).expand(1, tokens, 3)
    inputs = model.layer_inputs(positions, intervals=None)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # theirs is not the activations' memory
    with LiveBytes() as counter:
        out = hidden * 1.0
        for layer in model.layers:
            out = layer(out, inputs=inputs)[0]
        kept = counter.live
        out.sum().backward()
    return kept, counter.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="?", type=at_least(1), default=1024)
    parser.add_argument("kernels", nargs="?", choices=("torch", "native"), default="torch")
    options = parser.parse_args()
    tokens, native = options.tokens, options.kernels == "native"
    print("| recompute | kept, measured MiB | theory MiB | ratio | peak MiB |\n|---|---|---|---|---|")
    for name, engine in MODES.items():
        kept, peak = (value / 2**20 for value in measure(engine, tokens=tokens, native=native))
        theory = (MODEL.layers * theory_bytes(engine, tokens=tokens, native=native) + 4 * tokens * MODEL.width) / 2**20
        print(f"| {name} | {kept:.1f} | {theory:.1f} | {kept / theory:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main()
