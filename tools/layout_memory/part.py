"""Build one rank's part of a configuration's model here, without the other ranks: its size, its time and its peak.

    OMP_NUM_THREADS=1 .venv/bin/python tools/layout_memory/part.py configs/pretrain/ernie5_2t4.yaml --rank 700 \\
        parallel.dp=32 parallel.tp=4 parallel.pp=24 parallel.ep=64 parallel.etp=2

Ranks are numbered as a run of that layout numbers them; there are dp x cp x tp x pp of them.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_peers"))

from arguments import at_least, ended_in_words

from ernie5.config.load import load_config
from ernie5.model.backbone import UnifiedModel
from ernie5.parallel.apply import make_parts, shapes_of
from ernie5.parallel.held import GridPlace, planned_layout
from ernie5.parallel.stages import plan_stages
from ernie5.train.config import RootConfig

MMAP_THRESHOLD = -3
GIB = 2**30


def resident(field: str) -> int:
    """Bytes of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rank", type=at_least(0), default=0)
    parser.add_argument("overrides", nargs="*", help="parallel.tp=4 and the like")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system
    config = load_config(options.config, schema=RootConfig, overrides=options.overrides)
    parallel = config.parallel
    parallel.check_model(config.model)
    dims = parallel.derive_dims((parallel.dp or 1) * parallel.model_ranks, kv_heads=config.model.kv_heads)
    if options.rank >= dims.world_size:
        parser.error(f"--rank {options.rank}: {dims.describe()} has the ranks 0 to {dims.world_size - 1}")
    stages = plan_stages(config.model, pp=parallel.pp, vpp=parallel.vpp, stage_layers=parallel.stage_layers)
    before, start = resident("VmRSS"), time.process_time()
    model = UnifiedModel.outline(config.model, seed=config.train.seed)
    layout = planned_layout(shapes_of(model), place=GridPlace(dims, rank=options.rank), stages=stages)
    layout.leave_out(model)
    planned = time.process_time() - start
    make_parts(model, layout=layout)
    took = time.process_time() - start
    whole = sum(torch.Size(shard.shape).numel() for shard in layout.shards.values())
    held = sum(parameter.numel() for parameter in model.parameters())
    print(f"{dims.describe()}, rank {options.rank} of {dims.world_size}: {held:,} of {whole:,} parameters")
    print(f"{4 * held / GIB:.2f} GiB in fp32; peak {(resident('VmHWM') - before) / GIB:.2f} GiB above what the process "
          f"had; {took:.0f} CPU seconds, {planned:.1f} of them for the outline and the plan")


if __name__ == "__main__":
    sys.exit(ended_in_words(main))
