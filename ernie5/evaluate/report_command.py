"""`ernie5 report RUN_DIR`: draw report.html of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ernie5.config.arguments import CommandParser
from ernie5.errors import EXIT_DONE
from ernie5.evaluate.report import write_report


def main(argv: Sequence[str]) -> int:
    """Write RUN_DIR/report.html and say where it is; raises DataError for anything that is no run directory."""
    parser = CommandParser(
        prog="ernie5 report", description="Draw RUN_DIR/report.html: one self-contained page about a run."
    )
    parser.add_argument("run_dir", type=Path, help="directory of the run (train.run_dir)")
    options = parser.parse_args(argv)
    print(f"report: {write_report(options.run_dir)}")
    return EXIT_DONE
