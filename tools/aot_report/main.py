"""What the compiler says of the Triton kernels on three chips: `python tools/aot_report/main.py --out REPORT`.

All but those that make tables of tiles and blocks, and attention's sum over rows of dO * O.
Writes REPORT.md and REPORT.json. Needs no GPU; compiled kernels stay in Triton's cache, so a second run is quick.
Exits with 1 where a kernel spills, exceeds the chip's shared memory, or misses the tensor core that it is meant for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_peers"))

import elementwise_cases
import matrix_cases
import triton
from arguments import file
from cases import Case
from chips import CHIPS, Chip
from compiler import compile_for
from report import Row, row_of, write_json, write_markdown


def main(argv: Sequence[str]) -> int:
    """Compile, tabulate, judge."""
    every = (*elementwise_cases.cases(), *matrix_cases.cases())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=file, required=True, help="the report's path without ending")
    parser.add_argument("--chip", choices=[chip.name for chip in CHIPS], action="append", help="default: all")
    names = sorted({case.op for case in every})
    parser.add_argument("--op", action="append", metavar="OP", choices=names, help="only these operators")
    parser.add_argument("--quick", action="store_true", help="one default configuration of a few kernels")
    given = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set in the environment, and what is interpreted is not compiled. Unset it")
    chosen = [
        (chip, case) for chip in CHIPS if not given.chip or chip.name in given.chip
        for case in every if not given.op or case.op in given.op
        if chip.capability in case.capabilities and (case.quick or not given.quick)
    ]
    if not chosen:
        parser.error("no kernel is left to compile. Leave out --quick, or name another --op or --chip")
    rows = [measure(case, chip=chip) for chip, case in chosen]
    write_json(rows, path=given.out.with_suffix(".json"))
    write_markdown(rows, path=given.out.with_suffix(".md"))
    faults = [f"{row.chip} {row.op} {row.variant}: {fault}" for row in rows for fault in row.faults]
    print("\n".join(faults) or f"{len(rows)} kernels without a fault", flush=True)
    return 1 if faults else 0


def measure(case: Case, *, chip: Chip) -> Row:
    """Compile one case and say so, because a compilation takes seconds."""
    row = row_of(case, chip=chip, compiled=compile_for(case.source_for(chip.capability), capability=chip.capability))
    print(f"{chip.name} {case.op} {case.variant}: {row.registers} registers, {row.spills} spills", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
