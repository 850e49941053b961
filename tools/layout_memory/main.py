"""Peak memory of a training step per rank, layout by layout, beside what theory says it should be.

    OMP_NUM_THREADS=1 .venv/bin/python tools/layout_memory/main.py

Measured: the largest VmHWM of any rank while it builds its model and engine (start) and during the second step (peak),
less what the process held before it built its model.
Theory, fp32 with AdamW, P parameters of a rank: 16 P under the grid engine (weights, gradients, two moments); under
ZeRO over n ranks DeepSpeed keeps weights, gradients and a master with its moments: stage 0 16 P, stage 1
(8 + 12 / n) P, stage 2 (4 + 16 / n) P, stage 3 20 P / n and 4 bytes for each weight that is whole while a step runs:
what surrounds the layers, and one layer. Activations and buckets (1 MiB here) come on top: 64 tokens make them small.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from ernie5.data.document import Shapes
from ernie5.data.synthetic import synthetic_batch
from ernie5.engine import deepspeed_config
from ernie5.engine.config import EngineConfig
from ernie5.engine.grid import GridEngine
from ernie5.engine.interface import StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import ModelConfig, MoEConfig, MTPConfig
from ernie5.objectives.config import ObjectivesConfig
from ernie5.optim.config import OptimConfig
from ernie5.parallel import buckets
from ernie5.parallel.config import ParallelConfig
from ernie5.records import Batch
from ernie5.tokenizers.vocab import Vocab

VOCAB = Vocab(text_size=8000, audio_levels=2, audio_codes=16)
MODEL = ModelConfig(layers=4, width=384, query_heads=8, kv_heads=4, head_width=48, vocab_size=VOCAB.size_head,
                    modalities=("text",), mtp=MTPConfig(depth=0),
                    moe=MoEConfig(num_experts=16, top_k=2, expert_width=384))
MMAP_THRESHOLD = -3
LAYOUTS = (  # ranks, stage of ZeRO or none, degrees
    (1, None, {}), (2, None, {"ep": 2}), (4, None, {"ep": 4}), (2, None, {"etp": 2}), (2, None, {"tp": 2}),
    (4, None, {"tp": 4, "ep": 4}), (2, None, {"pp": 2}), (4, None, {"pp": 4}), (4, None, {"pp": 2, "ep": 2}),
    *((ranks, stage, {}) for ranks in (2, 4) for stage in range(4)), *((4, stage, {"ep": 2}) for stage in (1, 2, 3)),
)


def theory_bytes(stage: int | None, *, ranks: int, ep: int = 1, etp: int = 1, tp: int = 1, pp: int = 1) -> float:
    """Of the rank that holds most."""
    per_layer, around = {"expert": 0, "cut": 0, "whole": 0}, 0
    for name, parameter in UnifiedModel.outline(MODEL, seed=0).named_parameters():
        kind = "expert" if ".experts." in name else "cut" if ".attention." in name and "norm" not in name else "whole"
        if name.startswith("layers."):
            per_layer[kind] += parameter.numel() / MODEL.layers
        else:
            around += parameter.numel() / (tp if "text" in name else 1)
    experts, dense = per_layer["expert"] / (ep * etp), per_layer["cut"] / tp + per_layer["whole"]
    layers, dp = MODEL.layers // pp, ranks // (tp * pp)

    def held(number: float, *, n: int) -> float:
        return number * {None: 16, 0: 16, 1: 8 + 12 / n, 2: 4 + 16 / n, 3: 20 / n}[stage]

    total = held(layers * dense + around, n=dp) + held(layers * experts, n=max(1, dp // (ep * etp)))
    return total + (4 * (around + dense + experts) if stage == 3 else 0)


def run_rank(rank: int, ranks: int, stage: int | None, degrees: dict[str, int], store: str) -> tuple[int, int]:
    """Two steps; the peaks of the start and of the second step, in bytes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    buckets.BUCKET_ELEMENTS = deepspeed_config.BUCKET_ELEMENTS = 1 << 18
    shared = {"optim": OptimConfig(), "device": torch.device("cpu"),
              "settings": StepSettings(ObjectivesConfig(), 1.0, 0.01, torch.ones(4, dtype=torch.float64))}
    from ernie5.engine.deepspeed_engine import DeepSpeedEngine

    small = dataclasses.replace(MODEL, layers=1, moe=dataclasses.replace(MODEL.moe, num_experts=2))
    small = LocalEngine(build_model(small, seed=0), precision="fp32", **shared)
    small.train_step([batch_of(0)], learning_rate=1e-3)  # libraries that load late
    del small
    Path("/proc/self/clear_refs").write_text("5")
    before, model = resident("VmRSS"), UnifiedModel.outline(MODEL, seed=0)
    pp = degrees.get("pp", 1)
    shared["parallel"] = ParallelConfig(stage_layers=(MODEL.layers // pp,) * pp if pp > 1 else (), **degrees)
    engine = (GridEngine(model, engine=EngineConfig(kind="grid"), **shared) if stage is None else
              DeepSpeedEngine(model, engine=EngineConfig(zero_stage=stage), micro_batches=1, micro_sequences=1,
                              log_path=Path(os.devnull), **shared))
    start = resident("VmHWM") - before
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        engine.train_step([batch_of(engine.dp_rank)], learning_rate=1e-3)
    return start, resident("VmHWM") - before


def batch_of(rank: int) -> Batch:
    """A row of 64 tokens."""
    seen = MODEL.visual
    shapes = Shapes(bits=seen.bits, feature_channels=seen.encoder_channels, patch_pixels=seen.patch_pixels,
                    num_scales=seen.num_scales, audio_levels=2, audio_codes=16)
    return synthetic_batch(VOCAB, shapes=shapes, rows=1, sequence_tokens=64, seed=rank, mtp_depth=0, tasks=("text",))


def resident(field: str) -> int:
    """Bytes of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system
    print("| layout | ranks | engine | start, MiB | peak, MiB | theory, MiB | ratio |\n|---|---|---|---|---|---|---|")
    for ranks, stage, degrees in LAYOUTS:
        with tempfile.TemporaryDirectory() as work, multiprocessing.get_context("fork").Pool(ranks) as pool:
            jobs = [(rank, ranks, stage, degrees, f"{work}/store") for rank in range(ranks)]
            peaks = pool.starmap(run_rank, jobs, chunksize=1)
        start, peak = (max(found) / 2**20 for found in zip(*peaks, strict=True))
        theory = theory_bytes(stage, ranks=ranks, **degrees) / 2**20
        name = " ".join(f"{axis}{value}" for axis, value in degrees.items()) or f"dp{ranks}"
        engine = "grid" if stage is None else f"ZeRO-{stage}"
        figures = f"{start:.0f} | {peak:.0f} | {theory:.0f} | {peak / theory:.2f}"
        print(f"| {name} | {ranks} | {engine} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
