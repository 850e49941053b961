"""One row per kernel and chip, as Markdown and JSON, with the faults that make the tool fail."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from cases import Case
from chips import Chip
from compiler import Compiled

HEADS = (
    "op", "variant", "warps", "programs", "registers", "spills", "shared KiB", "occupancy", "tensor core", "copies",
    "MFLOP/tile", "KiB/tile", "roofline ms", "bound", "moved/least",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """Figures of one configuration on one chip; roofline: max(operations / rate, bytes / bandwidth) of the launch."""

    chip: str
    op: str
    variant: str
    warps: int
    programs: int
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    occupancy: float
    tensor_instruction: str
    copies: str
    operations_per_tile: float
    bytes_per_tile: float
    roofline_seconds: float
    bound: str
    moved_over_least: float
    faults: tuple[str, ...]


def row_of(case: Case, *, chip: Chip, compiled: Compiled) -> Row:
    """Join what was compiled with what the launch has to do."""
    work = case.work_for(chip.capability)
    arithmetic = work.operations / chip.rate_of(work.arithmetic)
    transfer = work.moved / chip.bandwidth
    shared = compiled.shared_bytes
    return Row(
        chip.name, case.op, case.variant, compiled.warps, case.programs_for(chip.capability), compiled.registers,
        compiled.spills, compiled.stack_bytes, shared,
        chip.occupancy(registers=compiled.registers, shared=shared, warps=compiled.warps),
        compiled.tensor_instruction, compiled.asynchronous_copies, work.operations / work.tiles,
        work.moved / work.tiles, max(arithmetic, transfer), "memory" if transfer > arithmetic else work.arithmetic,
        work.moved / work.least, tuple(_faults(case, chip=chip, compiled=compiled)),
    )


def _faults(case: Case, *, chip: Chip, compiled: Compiled) -> list[str]:
    found = []
    if compiled.spills or compiled.stack_bytes:
        found.append(f"{compiled.spills} spill instructions, {compiled.stack_bytes} bytes of stack")
    if compiled.shared_bytes > chip.shared_block:
        found.append(f"{compiled.shared_bytes} bytes of shared memory, the chip gives {chip.shared_block}")
    resident = chip.resident(registers=compiled.registers, shared=compiled.shared_bytes, warps=compiled.warps)
    programs = case.programs_for(chip.capability)
    if programs > max(1, resident):
        found.append(f"{programs} programs wanted on a processor that holds {resident}")
    if case.uses_tensor_core and compiled.tensor_instruction != chip.tensor_instruction:
        found.append(f"{compiled.tensor_instruction or 'no tensor core'} where the chip has {chip.tensor_instruction}")
    return found


def write_json(rows: Sequence[Row], *, path: Path) -> None:
    """All figures, unrounded."""
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def write_markdown(rows: Sequence[Row], *, path: Path) -> None:
    """A table per chip."""
    parts = []
    for chip in dict.fromkeys(row.chip for row in rows):
        lines = [f"### {chip}", "", "| " + " | ".join(HEADS) + " |", "|" + " --- |" * len(HEADS)]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows if row.chip == chip]
        parts.append("\n".join(lines) + "\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.op, row.variant, str(row.warps), str(row.programs), str(row.registers), str(row.spills),
        f"{row.shared_bytes / 1024:.0f}", f"{row.occupancy:.0%}", row.tensor_instruction or "-", row.copies or "-",
        f"{row.operations_per_tile / 1e6:.3g}", f"{row.bytes_per_tile / 1024:.3g}",
        f"{row.roofline_seconds * 1e3:.3g}", row.bound, f"{row.moved_over_least:.2f}",
    )
