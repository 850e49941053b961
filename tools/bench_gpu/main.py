"""The Triton kernels on a GPU beside PyTorch's: `python tools/bench_gpu/main.py --out FOLDER [--only TEXT ...]`.

Every case passes a gate of equality first, then ours and its peers are timed: medians of CUDA events around a replayed
graph with the L2 flushed. A case that fails is recorded with its error and the rest goes on. --tune instead tries tile
sizes of grouped_gemm and attention and prints the best. FOLDER gets bench_gpu.json, .md and .png (tune.json).
Exits with 2 without a GPU, with 1 where a case of ours failed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_peers"))  # behind the own files, of the same names

import report
from arguments import folder
from contest import Case, Row
from measure import Device, Stopwatch, describe, difference


def main(argv: Sequence[str]) -> int:
    """Parse, race or tune, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=folder, required=True, help="folder for the report")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose operator or name holds TEXT")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--tune", action="store_true", help="try tile sizes instead")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds after which no further case starts")
    given = parser.parse_args(argv)
    if not given.budget > 0:  # NaN is neither
        parser.error("--budget must be positive seconds")
    if not torch.cuda.is_available():
        parser.error("no CUDA device here: these figures come from a GPU or not at all (tools/aot_report needs none)")
    if given.tune:
        import tune

        return tune.run(folder=given.out, only=given.only, quick=given.quick, budget=given.budget)
    return race(given)


def race(given: argparse.Namespace) -> int:
    """Time every case and write after each, so that an interrupted run leaves what it has."""
    cases = list(chosen_cases(only=given.only, quick=given.quick))
    if not cases:
        print(f"no case holds {' or '.join(given.only)}", file=sys.stderr)
        return 2
    began, watch, rows = time.monotonic(), Stopwatch(), []
    device = describe(watch)
    print(report.describe(device) + "\n" + report.head(), flush=True)
    for case in cases:
        row = skipped(case) if time.monotonic() - began > given.budget else measure(case, watch=watch, device=device)
        rows.append(row)
        print(report.line(row), flush=True)
        report.write(rows, device=device, folder=given.out)
        gc.collect()
        torch.cuda.empty_cache()
    report.draw(rows, device=device, folder=given.out)
    print(f"{len(rows)} cases in {time.monotonic() - began:.0f} s", flush=True)
    return 1 if any(row.ours_ms is None for row in rows) else 0


def chosen_cases(*, only: Sequence[str], quick: bool) -> Iterator[Case]:
    """Cases of every family in turn."""
    import gated
    import masks
    import products
    import streams

    for family in (streams, products, gated, masks):
        for case in family.cases(quick=quick):
            if not only or any(text in f"{case.op} {case.name}" for text in only):
                yield case


def skipped(case: Case) -> Row:
    """The row of a case for which no time was left."""
    return Row(case.op, case.name, None, None, "", None, None, False, None, {}, ("not run: the budget was spent",))


def measure(case: Case, *, watch: Stopwatch, device: Device) -> Row:
    """Gate, then ours, then each peer."""
    timing, apart, peers, errors, contest = None, None, {}, [], None
    try:
        contest = case.build()
        if contest.truth is not None:
            apart = difference(contest.ours(), expected=contest.truth())
            if not apart <= contest.tolerance:
                raise ValueError(f"differs by {apart:.1e} of the largest value, allowed {contest.tolerance:.1e}")
        timing = watch.time(contest.ours, graph=contest.graph)
    except Exception as error:  # noqa: BLE001  any failure is a result here, and the other cases must run
        errors.append(f"ours: {said(error)}")
    for name, peer in contest.peers.items() if contest else ():
        try:
            peers[name] = watch.time(peer, graph=contest.graph).ms
        except Exception as error:  # noqa: BLE001  likewise
            errors.append(f"{name}: {said(error)}")
    if timing is None:
        return Row(case.op, case.name, None, None, "", None, None, False, apart, peers, tuple(errors))
    bound = contest.flops > 0
    rate = contest.flops / timing.ms / 1e9 if bound else contest.moved_bytes / timing.ms / 1e6
    share = rate / (device.bf16_tflops if bound else device.copy_gbs)
    unit = "TFLOP/s" if bound else "GB/s"
    return Row(case.op, case.name, timing.ms, rate, unit, share, timing.host_us, timing.graphed, apart, peers,
               tuple(errors))


def said(error: Exception) -> str:
    """The error's kind and the end of its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
