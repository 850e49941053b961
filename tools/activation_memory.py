"""Measure what the layers keep for backward, and the peak, with and without recompute, beside what theory says.

    OMP_NUM_THREADS=1 .venv/bin/python tools/activation_memory.py [TOKENS] [torch | native]
Counts the bytes of live tensors that the pass allocates (fp32, one process, text alone), not the process's memory.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and still live, and their largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage._cdata not in inputs | self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())
        return out

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


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


def main(tokens: int, native: bool) -> None:
    print("| recompute | kept, measured MiB | theory MiB | ratio | peak MiB |\n|---|---|---|---|---|")
    for name, engine in MODES.items():
        kept, peak = (value / 2**20 for value in measure(engine, tokens=tokens, native=native))
        theory = (MODEL.layers * theory_bytes(engine, tokens=tokens, native=native) + 4 * tokens * MODEL.width) / 2**20
        print(f"| {name} | {kept:.1f} | {theory:.1f} | {kept / theory:.2f} | {peak:.1f} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024, sys.argv[2:] == ["native"])
