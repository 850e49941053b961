"""Build a tiny engine on synthetic batches, take two steps of different sizes, and write what happened: run by the
tests, and by every rank of the multi-process tests as `python tiny_run.py JOB.json`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from ernie5.data.collate import Layout, collate_rows
from ernie5.data.document import Shapes
from ernie5.data.synthetic import TASKS, synthetic_batch, synthetic_document
from ernie5.engine import deepspeed_config
from ernie5.engine.config import EngineConfig
from ernie5.engine.interface import Engine, StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, VisualModelConfig
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import uniform_magnitudes
from ernie5.optim.config import OptimConfig
from ernie5.parallel.config import ParallelConfig
from ernie5.records import Batch
from ernie5.tokenizers.vocab import Vocab

VOCAB = Vocab(text_size=300, audio_levels=2, audio_codes=16)
MODEL = ModelConfig(
    layers=3,
    width=32,
    query_heads=2,
    kv_heads=1,
    head_width=16,
    vocab_size=VOCAB.size_head,
    dense_width=48,
    moe=MoEConfig(num_experts=8, top_k=2, expert_width=16),
    visual=VisualModelConfig(
        bits=4, num_scales=4, patch_pixels=2, encoder_channels=6, vit_width=16, vit_layers=1, vit_heads=2
    ),
    audio=AudioModelConfig(levels=2, codes=16),
)
SHAPES = Shapes(patch_pixels=2, feature_channels=6, bits=4, num_scales=4, audio_levels=2, audio_codes=16)


def make_batches(rows_per_batch: list[int], *, seed: int = 0) -> list[Batch]:
    """Micro-batches of different rows; every other one is text alone, so that two ranks see other modalities."""
    return [
        _rows(seed=1000 * seed + index, rows=rows, tasks=("text",) if index % 2 else TASKS)
        for index, rows in enumerate(rows_per_batch)
    ]


def cut_rows(rows_per_batch: list[int], *, tasks: tuple[str, ...] = TASKS) -> list[Batch]:
    """The same four (or fewer) packed rows, cut into micro-batches of the given sizes."""
    layout = Layout(160, VOCAB.pad, 1)
    rows = [
        tuple(synthetic_document(VOCAB, shapes=SHAPES, task=task, seed=10 * row + i) for i, task in enumerate(chosen))
        for row, chosen in enumerate((tasks[:1], tasks[1:3], tasks[3:5], tasks[5:7])[: sum(rows_per_batch)])
    ]
    rows = [tuple(document for document in row if document.length <= 70) for row in rows]
    batches, start = [], 0
    for count in rows_per_batch:
        batches.append(collate_rows(rows[start : start + count], layout=layout))
        start += count
    return batches


def _rows(*, seed: int, rows: int, tasks: tuple[str, ...]) -> Batch:
    return synthetic_batch(VOCAB, shapes=SHAPES, rows=rows, sequence_tokens=160, seed=seed, tasks=tasks)


def make_engine(kind: str, *, stage: int = 1, precision: str = "fp32", clip: float = 0.05, micro: int = 4,
                optimizer: str = "adamw", offload: str = "none", moments: str = "fp32",
                rounding: bool = False, nvme_path: Path | None = None) -> Engine:
    """A tiny engine; every call starts from the same weights."""
    model = (build_model if kind == "local" else UnifiedModel.outline)(MODEL, seed=3)
    settings = StepSettings(
        objectives=ObjectivesConfig(ema_decay=0.5),
        clip_norm=clip,
        balance_speed=0.01,
        magnitudes=uniform_magnitudes(vocab_size=MODEL.vocab_size, audio_codes=MODEL.audio.codes),
    )
    optim = OptimConfig(
        learning_rate=1e-2, clip_norm=clip, name=optimizer, moments=moments, stochastic_rounding=rounding
    )
    device = torch.device("cpu")
    if kind == "local":
        return LocalEngine(model, optim=optim, settings=settings, precision=precision, device=device)
    from ernie5.engine.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        model,
        engine=EngineConfig(
            zero_stage=stage, precision=precision, offload_optimizer=offload,
            nvme_path=None if nvme_path is None else str(nvme_path),
        ),
        parallel=ParallelConfig(),
        optim=optim,
        settings=settings,
        device=device,
        micro_batches=micro,
        micro_sequences=1,
        log_path=Path(os.devnull),
    )


def two_steps(engine: Engine, *, rank: int = 0, ranks: int = 1) -> dict[str, object]:
    """Run steps of four and six rows, as a batch ramp has; return losses, norms, first gradients and final state."""
    result: dict[str, object] = {"losses": [], "norms": [], "skipped": []}
    for step, rows in enumerate((4, 6)):
        batches = make_batches([1] * rows, seed=step)[rank::ranks]
        sums = engine.accumulate(batches)
        if step == 0:
            result["gradients"] = engine.gradients()
        report = engine.update(sums, learning_rate=1e-2)
        result["losses"].append([float(sums.terms.text), float(sums.terms.image), float(sums.terms.video),
                                 float(sums.terms.audio), float(sums.terms.mtp), float(sums.objective)])
        result["norms"].append(float(report.grad_norm))
        result["skipped"].append(report.skipped)
        result["loads"] = sums.routing.loads
    result["state"] = engine.state()
    return result


def main(path: str) -> None:
    """One rank of a multi-process test."""
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    results = {}
    # the tiny model fits into one bucket, within which stage 3 sorts: only several buckets show a wrong order
    deepspeed_config.BUCKET_ELEMENTS = job["bucket_elements"]
    for stage in job["stages"]:
        engine = make_engine("deepspeed", stage=stage, micro=4 // job["ranks"])
        results[stage] = two_steps(engine, rank=int(os.environ["RANK"]), ranks=job["ranks"])
        results[stage]["resident_elements"] = sum(p.numel() for p in engine.model.parameters())
        batch = make_batches([1], seed=7)[0]
        engine.evaluate_batch(batch)  # samples are drawn behind a validation
        with engine.whole_model(), torch.no_grad():
            if engine.is_main:  # the other rank does nothing here: no collective may be left in the model
                results[stage]["hidden_by_hand"] = engine.model(batch).text_hidden
        results[stage]["evaluated"] = float(engine.evaluate_batch(batch).objective)
        if stage == 3:
            copy = make_engine("deepspeed", stage=stage, micro=4 // job["ranks"])
            copy.load_state(results[stage]["state"])
            results[stage]["copied_state"] = copy.state()
    if engine.is_main:
        torch.save(results, job["out"])
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
