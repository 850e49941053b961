"""Peak memory of every rank while a checkpoint is saved and loaded, beside the state that the rank itself holds.

    python tools/checkpoint_memory.py --ranks 2 --layout ep=2 --width 512

Forks the ranks of a grid engine, and prints what a save that waits, one behind the training, and a load add at their
peak (VmHWM) to what stood before, beside a rank's state (fp32 weights, two moments). Exit code 1 beyond 1.2.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import tempfile
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


def main() -> int:
    """Run the measurement; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("width", 512), ("layers", 3), ("experts", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layout", default="ep=2", help="degrees such as tp=2,ep=2")
    parser.add_argument("--work", help="folder for the checkpoint")
    options = parser.parse_args()
    pool = multiprocessing.get_context("fork").Pool(options.ranks)
    with tempfile.TemporaryDirectory(dir=options.work) as work, pool:
        found = pool.starmap(run_rank, [(options, rank, Path(work)) for rank in range(options.ranks)], chunksize=1)
    largest, whole = max(one["state"] for one in found), found[0]["whole"]
    print(f"whole state {whole / 2**20:,.0f} MiB, largest rank {largest / 2**20:,.0f} MiB")
    for phase, added in ((phase, max(one[phase] for one in found)) for phase in ("save", "save behind", "load")):
        print(f"{phase}: {added / 2**20:,.1f} MiB added at the peak, {1 + added / largest:.3f} x the largest state")
    return int(max(one[phase] for one in found for phase in ("save", "load")) > 0.2 * largest)


def run_rank(options: argparse.Namespace, rank: int, work: Path) -> dict[str, int]:
    """One rank: build, save twice, load; bytes by phase."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/store", rank=rank, world_size=options.ranks)
    width, experts = options.width, options.experts
    moe = MoEConfig(num_experts=experts, top_k=2, expert_width=width)
    config = ModelConfig(layers=options.layers, width=width, query_heads=8, kv_heads=4, head_width=width // 8,
                         vocab_size=8192, dense_width=4 * width, modalities=("text",), moe=moe)
    settings = StepSettings(ObjectivesConfig(), 1.0, 0.01, torch.ones(4, dtype=torch.float64))
    degrees = {name: int(value) for name, value in (item.split("=") for item in options.layout.split(","))}
    model = build_model(config, seed=0)
    figures = {"whole": 12 * sum(p.numel() for p in model.parameters())}
    engine = GridEngine(model, engine=EngineConfig(kind="grid"), parallel=ParallelConfig(**degrees),
                        optim=OptimConfig(), settings=settings, device=torch.device("cpu"))
    for part in engine.slices():
        part.values.add_(1e-9)  # untouched zeros are no memory yet
    figures["state"] = sum(part.values.nbytes for part in engine.slices())
    saver = Saver(work / "checkpoints", config=CheckpointConfig(), engine=engine)

    def save(step: int, *, copies: bool) -> None:
        parts = [dataclasses.replace(part, values=part.values.clone()) if copies and part.is_written else part
                 for part in engine.slices()]
        run = RunState(step, 0, {}, {})
        saver.start(Contents(tuple(parts), 0, engine.magnitudes, run, "", "fp32", {}, rank, options.ranks))
        saver.settle(wait=True)
        saver.result()

    figures["save"] = peak(lambda: save(1, copies=False))
    figures["save behind"] = peak(lambda: save(2, copies=True))
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


if __name__ == "__main__":
    sys.exit(main())
