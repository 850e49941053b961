"""Peak memory of every rank while a checkpoint is saved and loaded, beside the state that the rank itself holds.

    python tools/checkpoint_memory/main.py --ranks 2 --layout ep=2 --width 512

Forks the ranks of a grid engine, and prints what a save that waits, one behind the training, and a load add at their
peak (VmHWM) to what stood before, beside a rank's state (fp32 weights, two moments); and how long a save behind the
training holds it up, beside a copy of the same values in memory (medians of five). Exit code 1 beyond 1.2.
"""

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_peers"))

from arguments import at_least, ended_in_words, folder
from rank import model_of, run_rank

from ernie5.parallel.config import ParallelConfig

AXES = ("dp", "cp", "tp", "ep", "etp")


def main() -> int:
    """Run the measurement; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("ranks", 2), ("width", 512), ("layers", 3), ("experts", 16)):
        parser.add_argument(f"--{name}", type=at_least(1), default=default)
    parser.add_argument("--layout", type=degrees, default="ep=2", help="degrees such as tp=2,ep=2")
    parser.add_argument("--work", type=folder, help="folder for the checkpoint")
    options = parser.parse_args()
    model, parallel = model_of(options), ParallelConfig(**options.layout)
    parallel.check_model(model)
    parallel.derive_dims(options.ranks, kv_heads=model.kv_heads)
    pool = multiprocessing.get_context("fork").Pool(options.ranks)
    with tempfile.TemporaryDirectory(dir=options.work) as work, pool:
        found = pool.starmap(run_rank, [(options, rank, Path(work)) for rank in range(options.ranks)], chunksize=1)
    largest, whole = max(one["state"] for one in found), found[0]["whole"]
    print(f"whole state {whole / 2**20:,.0f} MiB, largest rank {largest / 2**20:,.0f} MiB")
    for phase, added in ((phase, max(one[phase] for one in found)) for phase in ("save", "save behind", "load")):
        print(f"{phase}: {added / 2**20:,.1f} MiB added at the peak, {1 + added / largest:.3f} x the largest state")
    worst = {name: max(one[name] for one in found) for name in ("stall", "stall cpu", "copy", "copy cpu")}
    print("training is held up for {stall:.3f} s (CPU {stall cpu:.3f} s); a copy of the same values in memory takes "
          "{copy:.3f} s ({copy cpu:.3f} s)".format(**worst))
    return int(max(one[phase] for one in found for phase in ("save", "save behind", "load")) > 0.2 * largest)


def degrees(text: str) -> dict[str, int]:
    """Degrees by axis, from `tp=2,ep=2`."""
    found = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in AXES or not value.isdecimal():
            raise argparse.ArgumentTypeError(f"{item!r} is no axis=number; axes are {', '.join(AXES)}")
        found[name] = int(value)
    return found


if __name__ == "__main__":
    sys.exit(ended_in_words(main))
