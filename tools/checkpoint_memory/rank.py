"""One rank of a grid engine that saves and loads: bytes at the peak, and seconds."""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import open_run
from ernie5.checkpoint.manifest import RunState
from ernie5.checkpoint.save import Contents
from ernie5.checkpoint.saver import Saver
from ernie5.engine.config import EngineConfig
from ernie5.engine.grid import GridEngine
from ernie5.engine.interface import StepSettings
from ernie5.model.backbone import build_model
from ernie5.model.config import ModelConfig, MoEConfig
from ernie5.objectives.config import ObjectivesConfig
from ernie5.optim.config import OptimConfig
from ernie5.parallel.config import ParallelConfig

ROUNDS = 5


def model_of(options: argparse.Namespace) -> ModelConfig:
    """The model of the command line. Raises ConfigError for sizes that make none."""
    moe = MoEConfig(num_experts=options.experts, top_k=2, expert_width=options.width)
    return ModelConfig(layers=options.layers, width=options.width, query_heads=8, kv_heads=4,
                       head_width=options.width // 8, vocab_size=8192, dense_width=4 * options.width,
                       modalities=("text",), moe=moe)


def run_rank(options: argparse.Namespace, rank: int, work: Path) -> dict[str, float]:
    """One rank: build, save, load; bytes by phase, and seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/store", rank=rank, world_size=options.ranks)
    settings = StepSettings(ObjectivesConfig(), 1.0, 0.01, torch.ones(4, dtype=torch.float64))
    model = build_model(model_of(options), seed=0)
    figures = {"whole": 12 * sum(p.numel() for p in model.parameters())}
    engine = GridEngine(model, engine=EngineConfig(kind="grid"), parallel=ParallelConfig(**options.layout),
                        optim=OptimConfig(), settings=settings, device=torch.device("cpu"))
    for part in engine.slices():
        part.values.add_(1e-9)  # untouched zeros are no memory yet
    figures["state"] = sum(part.values.nbytes for part in engine.slices())
    saver = Saver(work / "checkpoints", config=CheckpointConfig(), engine=engine)

    stalls: list[tuple[float, float]] = []
    copies: list[tuple[float, float]] = []

    def save(step: int, *, behind: bool) -> None:
        run = RunState(step, 0, {}, {})
        contents = Contents(tuple(engine.slices()), 0, engine.magnitudes, run, "", "fp32", {}, rank, options.ranks)
        stalls.append(seconds(lambda: saver.start(contents, behind=behind)))
        saver.settle(wait=True)
        saver.result()

    figures["save"] = peak(lambda: save(1, behind=False))
    figures["save behind"] = peak(lambda: save(2, behind=True))
    for step in range(3, 3 + ROUNDS):
        copies.append(seconds(lambda: [part.values.clone() for part in engine.slices() if part.is_written]))
        save(step, behind=True)
    for name, found in (("stall", stalls[2:]), ("copy", copies)):
        figures[name], figures[f"{name} cpu"] = (statistics.median(column) for column in zip(*found, strict=True))
    figures["load"] = peak(lambda: engine.load_state(open_run(work / "checkpoints").engine))
    dist.destroy_process_group()
    return figures


def peak(run: Callable[[], None]) -> int:
    """Bytes of resident memory that `run` added at its peak to what stood before."""
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = resident("VmRSS"), run()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and those of this process's CPU time, until `run` returns."""
    clock, cpu = time.perf_counter(), time.process_time()
    kept = run()  # what it returns is freed outside of the figures
    figures = time.perf_counter() - clock, time.process_time() - cpu
    del kept
    return figures
