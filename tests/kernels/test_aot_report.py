"""The compiler's report on the Triton kernels: default configurations of a few of them, compiled for one chip."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

WITHOUT_INTERPRETER = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}


def test_default_configurations_compile_for_h100_without_spills_and_use_its_tensor_core(
    repository: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "tools/aot_report/main.py", "--quick", "--chip", "H100", "--out", tmp_path / "report"],
        cwd=repository, capture_output=True, text=True, timeout=500, env=WITHOUT_INTERPRETER,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["op"], row["variant"]): row for row in json.loads((tmp_path / "report.json").read_text())}
    products = {"grouped_gemm", "grouped_swiglu"}
    assert {op for op, _ in rows} == {"swiglu", "rms_norm", "quant_cast", "adamw_compact", *products}
    product = rows["grouped_gemm", "forward, mean 32 rows"]
    assert product["tensor_instruction"] == "wgmma" and product["copies"] == "TMA" and product["programs"] == 3
    assert rows["grouped_swiglu", "mean 32 rows"]["copies"] == "TMA"
    assert rows["grouped_swiglu", "mean 32 rows, gathered"]["copies"] == "TMA+cp.async"
    assert all(row["spills"] == 0 and row["registers"] > 8 and row["faults"] == [] for row in rows.values())
    assert all(row["moved_over_least"] <= 1.15 for (op, _), row in rows.items() if op != "grouped_gemm")
    assert "| swiglu | forward |" in (tmp_path / "report.md").read_text()


@pytest.fixture
def tool(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The tool's modules, forgotten afterwards because they have everyday names."""
    monkeypatch.syspath_prepend(str(repository / "tools" / "aot_report"))
    names = ("chips", "compiler", "cases", "report", "elementwise_cases", "matrix_cases")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


def test_the_report_fails_where_a_kernel_spills_or_misses_its_tensor_core(tool: SimpleNamespace) -> None:
    work = tool.cases.Work(operations=2e12, moved=1e9, least=5e8, tiles=10, arithmetic="bf16")
    case = tool.cases.Case("x", "y", lambda _: None, lambda _: work, uses_tensor_core=True)
    good = tool.compiler.Compiled(128, 0, 0, 100_000, 8, "wgmma", "TMA")
    h100 = tool.chips.CHIPS[1]
    row = tool.report.row_of(case, chip=h100, compiled=good)
    assert row.faults == () and row.occupancy == 0.25 and row.bound == "bf16" and row.moved_over_least == 2.0
    assert row.roofline_seconds == pytest.approx(2e12 / 989e12)
    bad = tool.compiler.Compiled(255, 3, 16, 300_000, 8, "mma", "")
    assert len(tool.report.row_of(case, chip=h100, compiled=bad).faults) == 3


def test_the_report_fails_where_the_programs_of_a_launch_do_not_fit_a_processor(tool: SimpleNamespace) -> None:
    work = tool.cases.Work(operations=2e12, moved=1e9, least=5e8, tiles=10, arithmetic="bf16")
    h100 = tool.chips.CHIPS[1]

    def faults(*, programs: int, registers: int, shared: int) -> tuple[str, ...]:
        case = tool.cases.Case("x", "y", lambda _: None, lambda _: work, programs_for=lambda _: programs)
        compiled = tool.compiler.Compiled(registers, 0, 0, shared, 8, "wgmma", "TMA")
        return tool.report.row_of(case, chip=h100, compiled=compiled).faults

    assert not faults(programs=2, registers=128, shared=113 << 10)
    too_many = ("2 programs wanted on a processor that holds 1",)
    assert faults(programs=2, registers=129, shared=113 << 10) == too_many
    assert faults(programs=2, registers=128, shared=114 << 10) == too_many


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_product_over_odd_widths_spills_nothing_and_keeps_its_tensor_core(
    tool: SimpleNamespace, capability: int
) -> None:
    """With the tiles of even widths 150, 384 and 787 instructions move registers to memory or back (Triton 3.9)."""
    case = next(case for case in tool.matrix_cases.cases() if case.variant == "forward, even load, odd widths")
    found = tool.compiler.compile_for(case.source_for(capability), capability=capability)
    assert found.spills == 0 and found.tensor_instruction == {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]


@pytest.mark.parametrize("variant", ["bf16 weights, 8-bit moments", "fp32 masters, bf16 copies, 8-bit moments"])
def test_adamw_with_less_state_rounds_each_operation_by_itself_as_pytorch_does(
    tool: SimpleNamespace, variant: str
) -> None:
    """What the interpreter proves of its bits holds on a GPU if nothing is fused, approximate or flushed to zero."""
    case = next(case for case in tool.elementwise_cases.cases() if case.variant == variant)
    written = tool.compiler.build(case.source_for(90), capability=90).asm["ptx"]
    assert "sqrt.rn.f32" in written and "div.rn.f32" in written and "mul" in written
    assert not re.findall(r"fma\S*f32|mad\S*f32|\S*\.(?:ftz|approx|full)\S*", written)
